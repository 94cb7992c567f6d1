"""What a run says at its end: where the results are, and commands to go on with."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.convert.layouts.base import vit_form
from cap_pretrain.errors import UserError
from cap_pretrain.learners.protocols import Classifies, EmbedsText, WritesCaptions
from cap_pretrain.models.sizes import STORED

MAIN = "python -m cap_pretrain.main"


def lines(config: ConfigDict, workdir: Path, step: int) -> str:
    """Return where a finished run has left what, and what to do next with it.

    `step` is that of its newest checkpoint, 0 if there is none.
    """
    found = [
        f"{workdir / name}" for name in ("metrics.jsonl", "evals") if (workdir / name).exists()
    ]
    if step:
        found.append(f"{workdir / 'checkpoints' / str(step)}")
    text = f"Results: {', '.join(found)}"
    commands = _commands(config, workdir) if step else []
    return "\n".join([text, *(f"Next: {command}" for command in commands)])


def _commands(config: ConfigDict, workdir: Path) -> Sequence[str]:
    run = quote(str(workdir))
    try:
        vit_form(config, "transformers")
        last = f"cap export --checkpoint {run} --out {run}/exported"
    except UserError:  # no library holds such an encoder
        last = f"cap report {run} --serve 8000"
    if learners.able(config, WritesCaptions):
        if config.model.name == STORED:  # it reads no images
            return [last]
        return [f"cap caption --checkpoint {run} photo.jpg", last]
    if learners.able(config, Classifies):
        evaluators = "accuracy"
    else:
        evaluators = "retrieval" if learners.able(config, EmbedsText) else "knn+linear_probe"
    data = "" if evaluators == "retrieval" else ",data=LABELLED_DATASET"
    judge = f"{MAIN} --config=configs/evaluate.py:evals={evaluators}{data} "
    judge += f"--workdir={run}_judged --config.encoder={run}"
    return [judge, last]
