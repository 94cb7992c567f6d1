"""Evaluate a run or a pretrained encoder without training: the same as configs/evaluate.py.

    cap evaluate runs/cappa --evals=retrieval+composition
    cap evaluate runs/cappa/checkpoints/300 --evals=linear_probe+knn --data=data/imagenette
    cap evaluate exported/cappa --evals=knn --data=data/imagenette --workdir=runs/judged

RUN is a workdir, one of its checkpoints, an exported encoder, or one of another library; a folder
or gs://BUCKET/FOLDER. Results are printed and written to WORKDIR/evals. Further arguments go to the
program of `cap train`, as --config.evals.retrieval.limit=5000; `cap fields evals.NAME` lists the
options of an evaluator.
"""

import sys

from cap_pretrain import files
from cap_pretrain.cli import arguments, config_files
from cap_pretrain.commands import train
from cap_pretrain.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run the program with its arguments and end the process with its exit status."""
    parser = arguments.documented_parser(__doc__)
    parser.allow_abbrev = False
    parser.add_argument("run", metavar="RUN", help="workdir, checkpoint or encoder to evaluate")
    parser.add_argument("--evals", default="loss", help="evaluators, joined by +; default: loss")
    parser.add_argument("--data", default="", help="dataset; default: that of the run's training")
    where = "folder of the results; default: beside RUN, with _evaluated added to its name"
    parser.add_argument("--workdir", help=where)
    args, rest = parser.parse_known_args(argv)
    chosen = ",".join([f"evals={args.evals}", *[f"data={args.data}"] * bool(args.data)])
    try:
        workdir = args.workdir or beside(args.run)
    except UserError as error:
        parser.error(f"RUN: {error}")
    config = config_files.shipped() / "evaluate.py"
    return train.main(
        [f"{config}:{chosen}", f"--workdir={workdir}", f"--config.encoder={args.run}", *rest]
    )


def beside(run: str) -> str:
    """Return the default folder of results: runs/a -> runs/a_evaluated, or …_STEP_evaluated."""
    path = files.place(run)
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent}_{path.name}_evaluated"
    return f"{path}_evaluated"


if __name__ == "__main__":
    sys.exit(main())
