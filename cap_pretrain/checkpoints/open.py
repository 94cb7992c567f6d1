"""Loading whatever holds a trained encoder or learner, by its path, for use outside of a run."""

import os
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from cap_pretrain import config as configs
from cap_pretrain import files, inputs, learners
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.checkpoints.load import Learner, Say, assemble, load_learner, to_stderr
from cap_pretrain.data.text.tokenizers import NoText, Tokenizer
from cap_pretrain.errors import UserError
from cap_pretrain.naflex import SQUARE


class Run(NamedTuple):
    """The workdir of a run, and the step of one of its checkpoints; None is the newest valid."""

    workdir: Path
    step: int | None


def run_of(path: str | os.PathLike[str], step: int | None = None) -> Run | None:
    """Return the run that a path names; None if it names none, as an exported encoder.

    The path is a workdir, or one checkpoint of it (runs/cappa/checkpoints/300); either may be in a
    bucket (gs://). Raises UserError if it is another URL, or if `step` is another one than that of
    the path.
    """
    text = os.fspath(path)
    workdir, own = warm_start.which_run(files.place(text).expanduser())
    if step is not None and own not in (None, step):
        raise UserError(f"step: {step} is given, but {text} is the checkpoint of step {own}.")
    if warm_start.is_run(workdir) or (workdir / "metrics.jsonl").is_file():
        return Run(workdir, own if step is None else step)
    return None


def run_at(path: str | os.PathLike[str], step: int | None = None) -> Run:
    """Return the run that a path names, see `run_of`, or is taken to name if it is incomplete."""
    return run_of(path, step) or Run(files.place(path), step)


def open_learner(
    path: str | os.PathLike[str],
    step: int | None = None,
    mesh: Mesh | None = None,
    say: Say = to_stderr,
) -> Learner:
    """Load the learner at a path, or the encoder, as the learner `encoder`.

    The path is what `config.encoder` accepts: a workdir (its newest valid checkpoint, or that of
    `step`), one checkpoint of it (runs/cappa/checkpoints/300), or a pretrained encoder (see
    `convert.open_encoder`), whose images are cropped as its own preprocessing crops them. A dual
    encoder is loaded whole (see `convert.dual`). Each may be in a bucket (gs://). `mesh` and `say`
    are those of `load_learner`.

    Raises:
        UserError: There is none of these, the path is another URL, or `step` is given for a path
            that has no steps.
    """
    run = run_of(path, step)
    if run:
        return load_learner(run.workdir, mesh, run.step, say)
    text = os.fspath(path)
    place = files.place(text).expanduser()
    if not place.exists():
        raise UserError(
            f"{text}: is not the folder of a run: no such file or folder; give the workdir of a "
            "run, a checkpoint in it, an exported folder or a folder of transformers."
        )
    if step is not None:
        raise UserError(f"step: {text} is not a workdir, so it has no steps; leave step out.")
    with files.local(place) as copy:
        return _imported(copy, mesh, say)


def _imported(place: Path, mesh: Mesh | None, say: Say) -> Learner:
    """Load an encoder, or a dual encoder with its text tower and tokenizer."""
    config = configs.default()
    with config.unlocked():
        config.learner = learners.defaults("pretrained")
        weights = warm_start.from_import(config, place, place, say)
        if config.data.layout == SQUARE:
            config.data.crop = warm_start.evaluation_crop(place)
    tokenizer: Tokenizer = NoText()
    if "text" in learners.learner_class(config.learner.name).reads:
        tokenizer = inputs.open_tokenizer(config, config.text.tokenizer)
    return assemble(config.lock(), tokenizer, weights.params, weights.stats, (weights.source, mesh))
