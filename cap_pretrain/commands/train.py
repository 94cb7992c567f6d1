"""Train a model as a config says, or resume a run: the same as `python -m cap_pretrain.main`.

    cap train quickstart --workdir=runs/quickstart
    cap train pretrain:objective=cap,data=data/mine --workdir=runs/cap --config.total_steps=9000
    cap train --config=configs/pretrain.py --workdir=runs/cappa --dry_run

The config comes first, or as --config. See `cap train --help` for the flags, `cap configs` for the
configs and `cap fields` for their fields.
"""

import sys
from typing import NoReturn

from cap_pretrain import main as program


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the program with its arguments and end the process with its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        argv = [f"--config={argv[0]}", *argv[1:]]
    sys.argv = [sys.argv[0], *argv]
    program.leave()


if __name__ == "__main__":
    main()
