"""Train a model as a config says, or resume a run: the same as `python -m cap_pretrain.main`.

    cap train quickstart --workdir=runs/quickstart
    cap train pretrain:objective=cap,data=data/mine --workdir=runs/cap --config.total_steps=9000
    cap train --config=configs/pretrain.py --workdir=runs/cappa --dry_run
    cap train my_photos captions.csv

The config comes first, or as --config. --config.some.field=value sets any field. Starting again
with the same workdir resumes the run. --dry_run writes WORKDIR/plan.json and prints it. A folder of
photos and a table of captions are built into a dataset, and a model is trained on it: see
`cap train my_photos captions.csv --help`.
"""

import sys

from cap_pretrain import main as program
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry import console


def main(argv: list[str] | None = None) -> int:
    """Train, and end the process with the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) > 1 and not any(arg.startswith("-") for arg in argv[:2]):
        argv = _on_own_data(argv)
    elif {"-h", "--help"} & set(argv):
        print(program.usage(__doc__))
        return 0
    elif argv and not argv[0].startswith("-"):
        argv = [f"--config={argv[0]}", *argv[1:]]
    sys.argv = [sys.argv[0], *argv]
    program.leave()
    return 0


def _on_own_data(argv: list[str]) -> list[str]:
    """Build the dataset that photos and a table make; return the arguments of the run."""
    with console.used():
        with console.doing("Loading what reads photos", say=False):
            from cap_pretrain.cli import own_data
            from cap_pretrain.data.builders.units import UnfinishedError
        try:
            return own_data.prepare(argv)
        except (UserError, UnfinishedError, OSError) as error:
            sys.exit(program.say(error, 2))


if __name__ == "__main__":
    sys.exit(main())
