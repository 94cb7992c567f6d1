"""Loading whatever holds a trained encoder or learner, by its path, for use outside of a run."""

import os
from pathlib import Path

from jax.sharding import Mesh

from cap_pretrain import config as configs
from cap_pretrain import convert, learners
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.checkpoints.load import Learner, Say, assemble, load_learner, to_stderr
from cap_pretrain.data.text.tokenizers import NoText
from cap_pretrain.errors import UserError


def open_learner(
    path: str | os.PathLike[str],
    step: int | None = None,
    mesh: Mesh | None = None,
    say: Say = to_stderr,
) -> Learner:
    """Load the learner at a path, or the encoder, as the learner `encoder`.

    The path is what `config.encoder` accepts: a workdir (its newest valid checkpoint, or that of
    `step`), one checkpoint of it (runs/cappa/checkpoints/300), or a pretrained encoder (see
    `convert.open_encoder`), whose images are cropped as its own preprocessing crops them. `mesh`
    and `say` are those of `load_learner`.

    Raises:
        UserError: There is none of these, the path is a URL, or `step` is given for a path that has
            no steps.
    """
    text = os.fspath(path)
    if "://" in text:
        raise UserError(f"{text}: is a URL; copy what it names to a folder and give its path.")
    place = Path(text).expanduser()
    run, own = warm_start.which_run(place)
    if step is not None and own not in (None, step):
        raise UserError(f"step: {step} is given, but {text} is the checkpoint of step {own}.")
    if warm_start.is_run(run) or (run / "metrics.jsonl").is_file():
        return load_learner(run, mesh, own if step is None else step, say)
    if not place.exists():
        raise UserError(
            f"{text}: no such file or folder; give the workdir of a run, a checkpoint in it, an "
            "exported folder or a folder of transformers."
        )
    if step is not None:
        raise UserError(f"step: {text} is not a workdir, so it has no steps; leave step out.")
    config = configs.default()
    with config.unlocked():
        config.learner = learners.defaults("pretrained")
        weights = warm_start.from_import(config, place)
        # Evaluation takes the central square where training would crop at random.
        config.data.crop = "random" if convert.crops_center(place) else "none"
    return assemble(config.lock(), NoText(), weights.params, weights.stats, (weights.source, mesh))
