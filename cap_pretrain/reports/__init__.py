"""The report of runs: one HTML page of what was run, its curves, examples and cost.

    from cap_pretrain import reports

    page = reports.render(["runs/cap", "runs/clip"])  # text of a page

It is made from the files of a workdir alone, so it works for a run that goes on, has ended or came
from another machine:

    config.json, metrics.jsonl, evals/, plan.json, broken.jsonl
    report/facts.json         what a run notes of itself, see `journal`
    report/NAME.shown.json    examples of evaluator NAME, see `evals.exhibits`

The modules: `journal` writes during a run; `workdir` reads, `series` makes curves, `deltas`
compares configs, `page` and `sections` make HTML, `server` serves it while a run goes on.
"""

from collections.abc import Sequence
from os import PathLike

from cap_pretrain import files

FILE = "report.html"
"""Name of the page in a workdir."""


def render(runs: Sequence[str | PathLike[str]] | str | PathLike[str], *, live: int = 0) -> str:
    """Return the report of one run or several as a self-contained HTML page.

    Args:
        runs: Workdirs of runs, or paths in them such as WORKDIR/checkpoints/STEP; local, or gs://.
        live: Seconds after which a page that is served looks for news; 0: never.

    Raises:
        UserError: A path is not a run.
    """
    from cap_pretrain.reports import page, workdir

    paths = [runs] if isinstance(runs, str | PathLike) else list(runs)
    return page.page(workdir.read_all([files.place(path) for path in paths]), live=live)
