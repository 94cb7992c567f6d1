"""Initializing a learner from trained weights: `config.encoder`.

The path names a workdir (its newest valid checkpoint), one checkpoint of a workdir
(runs/cappa/checkpoints/300), or an imported encoder; each may be in a bucket (gs://). A learner
with an encoder takes that encoder's weights, and the fields of `config.model` and `data.image_size`
that belong to them. The learner `pretrained` takes everything found there: the whole learner of a
workdir, and its data if `data.name` is empty; a whole dual encoder from elsewhere, with its
tokenizer; or the bare encoder.
"""

import dataclasses
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import convert, files, inputs, learners, rules
from cap_pretrain.checkpoints.folders import saved_steps
from cap_pretrain.checkpoints.load import read_config, read_weights
from cap_pretrain.convert import dual
from cap_pretrain.errors import UserError
from cap_pretrain.models.sizes import parse_name
from cap_pretrain.models.vit import Resample, resample_positions
from cap_pretrain.naflex import NAFLEX, SQUARE
from cap_pretrain.optim import schedule_free
from cap_pretrain.training.changes import fields
from cap_pretrain.training.step import TrainState
from cap_pretrain.untrusted import parsing

# Fields of `config.model` that belong to no weights.
FREE_FIELDS = (
    *("attention", "remat", "unroll", "logit_chunks", "dropout", "stochastic_depth"),
    *("keep_tokens", "keep_tokens_at", "keep_tokens_until"),
)
# Fields of `config.model` that do not depend on the weights of the encoder.
OWN_FIELDS = (
    *("decoder_width", "decoder_depth", "decoder_mlp", "decoder_heads"),
    *FREE_FIELDS,
)


@dataclasses.dataclass(frozen=True)
class PretrainedWeights:
    """Trained arrays, by path in the learner, that replace randomly initialized ones."""

    params: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]  # other variables, such as BatchNorm statistics
    source: str  # where they come from, for messages
    resample: Resample = resample_positions  # for images of other sizes

    def put(self, state: TrainState) -> TrainState:
        """Return `state` with these arrays in place, with the shardings of those they replace.

        Averages of the parameters restart from the new ones. Raises UserError if the
        learner lacks one of the arrays, or has it in another shape.
        """
        params = _replaced(state.params, self.params, self.source)
        ema = None if state.ema is None else jax.tree.map(lambda p: p.copy(), params)
        stats = _replaced(state.stats, self.stats, self.source)
        opt_state = schedule_free.restarted(state.opt_state, params)
        return state.replace(params=params, stats=stats, opt_state=opt_state, ema=ema)

    def for_images(self, config: ConfigDict) -> "PretrainedWeights":
        """Resample the position embeddings of ViTs, teachers' too, to `data.image_size`."""

        def resampled(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = [path for path in arrays if f"/{path}".endswith("/encoder/positions")]
            return arrays | {path: self._positions(arrays[path], config) for path in found}

        return dataclasses.replace(self, params=resampled(self.params), stats=resampled(self.stats))

    def _positions(self, positions: np.ndarray, config: ConfigDict) -> np.ndarray:
        """Resample position embeddings [N, D] of a ViT to `data.image_size`."""
        _, patch = parse_name(config.model.name)
        old, new = math.isqrt(len(positions)), config.data.image_size // patch
        if new == old or new < 1:
            return positions
        return np.asarray(self.resample(jnp.asarray(positions), (old, old), (new, new)))


def resolve(
    config: ConfigDict,
    given: Collection[str] = (),
    say: Callable[[str], None] = print,
    workdir: Path | None = None,
) -> tuple[ConfigDict, PretrainedWeights | None]:
    """Load `config.encoder`, if any; return the config with the fields it sets, and the weights.

    Fields in `given`, from the command line, keep their values. `say` receives a line about values
    of the config file that are replaced. A run that resumes in `workdir` takes the fields from its
    own config.json, and does not need the encoder any more: there are no weights then. Raises
    UserError if there is no encoder at that path, or no valid checkpoint, or if a field in `given`
    does not fit it.
    """
    if not config.encoder:
        if config.learner.name == "pretrained":
            raise UserError(
                "encoder: is empty; give --config.encoder=PATH to say what to evaluate."
            )
        return config, None
    path, weights = _place(config.encoder), None
    asked, config = config, config.copy_and_resolve_references()
    with config.unlocked():
        run, step = which_run(path)
        if workdir and configs.trains(config) and saved_steps(workdir) and is_run(workdir):
            _take_fields(config, read_config(workdir), given)
        elif is_run(run):
            weights = _from_workdir(config, run, step, given)
        else:
            with files.local(path) as copy:
                weights = from_import(config, copy, path, say, given)
            source = weights.source.replace(str(copy), str(path))
            weights = dataclasses.replace(weights, source=source)
        if "data.image_size" in given:
            config.data.image_size = asked.data.image_size
            weights = weights and weights.for_images(config)
    source = weights.source if weights else f"the run in {workdir}"
    _check_replaced(asked, config, given, source, say)
    return config.lock(), weights


def _place(encoder: str) -> Path:
    try:
        return files.place(encoder)
    except UserError as error:
        raise UserError(f"encoder: {error}") from error


def is_run(folder: Path) -> bool:
    """Return whether a folder is the workdir of a run with checkpoints."""
    with parsing("encoder"):
        return (folder / "config.json").is_file() and (folder / "checkpoints").is_dir()


def which_run(path: Path) -> tuple[Path, int | None]:
    """Split runs/a/checkpoints/300 into runs/a and 300; runs/a gives None, the newest step."""
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None


def _check_replaced(
    asked: ConfigDict,
    config: ConfigDict,
    given: Collection[str],
    source: str,
    say: Callable[[str], None],
) -> None:
    """Refuse that fields in `given` are replaced, and say which others are.

    Args:
        asked: the config before its fields were replaced.
        config: the config afterwards.
        given: the fields given on the command line.
        source: where the new values come from.
        say: receives a line about replaced fields that the config file had changed.
    """
    default, before, after = (fields(c.to_dict()) for c in (configs.default(), asked, config))
    unused = []
    for field, value in after.items():
        was = before.get(field, value)
        # The learner `pretrained` and an empty data.name ask for those of the run.
        if was == value or field.startswith("learner.") or (field == "data.name" and not was):
            continue
        if field in given:
            raise UserError(
                f"{field}: {was!r} is given, but {source} needs {value!r}; leave "
                f"--config.{field} out."
            )
        if was != default.get(field):
            unused.append(f"{field}={was!r} (now {value!r})")
    if unused:
        say(f"Settings of the config file that {source} replaces: {', '.join(unused)}.")


def _chosen(config: ConfigDict, section: str, given: Collection[str]) -> dict[str, Any]:
    """Return the fields of a section that were given or that the config file has changed."""
    default = fields(configs.default()[section].to_dict())
    own = fields(config[section].to_dict())
    return {k: v for k, v in own.items() if f"{section}.{k}" in given or v != default.get(k)}


def _take_fields(config: ConfigDict, saved: ConfigDict, given: Collection[str]) -> None:
    """Copy the fields that belong to a run's weights from its config, `saved`, into `config`."""
    whole = config.learner.name == "pretrained"
    chosen = _chosen(config, "model", given)
    kept = [k for k in FREE_FIELDS if k in chosen] if whole else OWN_FIELDS
    config.model.update({**saved.model, **{k: config.model[k] for k in kept}})
    if whole and not config.data.name:
        always = {"workers": config.data.workers, "dir": config.data.dir}
        own = always | _chosen(config, "data", given)
        config.data.update(saved.data.to_dict())
        config.data.update_from_flattened_dict({k: v for k, v in own.items() if k != "name"})
    config.data.image_size = saved.data.image_size
    _take_layout(config, saved.data.layout, given)
    if whole:
        config.learner = saved.learner
        config.text.update(saved.text)


def _take_layout(config: ConfigDict, layout: str, given: Collection[str]) -> None:
    """Set how images are laid out as for an encoder's training, and whole if it saw them whole."""
    if "data.layout" not in given:
        config.data.layout = layout
    if config.data.layout == NAFLEX and "data.crop" not in given:
        config.data.crop = "none"


def _from_workdir(
    config: ConfigDict, workdir: Path, step: int | None, given: Collection[str]
) -> PretrainedWeights:
    """Load a run's weights and copy the matching fields of its config into `config`."""
    whole = config.learner.name == "pretrained"
    _take_fields(config, read_config(workdir), given)
    if whole:
        tokenizer = inputs.tokenizer_path(workdir)
        config.text.tokenizer = str(tokenizer) if tokenizer.is_file() else ""
    step, _, params, stats = read_weights(workdir, step)
    if not whole:
        params, stats = (
            {path: array for path, array in arrays.items() if path.startswith("encoder/")}
            for arrays in (params, stats)
        )
    return PretrainedWeights(params, stats, f"step {step} of {workdir}")


def from_import(
    config: ConfigDict,
    copy: Path,
    place: Path,
    say: Callable[[str], None],
    given: Collection[str] = (),
) -> PretrainedWeights:
    """Load what was trained elsewhere and set the fields of `config` that describe it.

    `copy` is the folder or file on this machine, `place` what the config calls it. For the learner
    `pretrained`, a dual encoder is loaded whole; `say` receives a line if it cannot be. Unless
    `data.crop` is `given`, its evaluation crops images as its own preprocessing does.
    """
    found = convert.open_encoder(copy)
    defaults = {k: v for k, v in configs.default().model.items() if k not in OWN_FIELDS}
    config.model.update(defaults | found.model)
    config.data.image_size = found.image_size or config.data.image_size
    _take_layout(config, found.layout, given)
    params, stats = (
        {f"encoder/{path}": array for path, array in rules.flatten(tree).items()}
        for tree in (found.params, found.stats)
    )
    if config.learner.name == "pretrained":
        config.learner = learners.defaults("encoder")
        whole, note = dual.read(copy, found)
        if whole:
            config.learner = learners.defaults("dual_encoder", **whole.learner)
            config.text.update(whole.text | {"tokenizer": str(place / whole.text["tokenizer"])})
            params |= whole.params
            square = config.data.layout == SQUARE
            if square and not configs.trains(config) and "data.crop" not in given:
                config.data.crop = evaluation_crop(copy)
        elif note:
            say(f"{note}.")
    return PretrainedWeights(params, stats, found.source, found.resample)


def evaluation_crop(path: Path) -> str:
    """Return the `data.crop` with which evaluation crops as an encoder's own preprocessing does.

    Where training would crop at random, evaluation takes the central square.
    """
    return "random" if convert.crops_center(path) else "none"


def _replaced(tree: Any, arrays: dict[str, np.ndarray], source: str) -> Any:
    """Return `tree` with the leaves at the paths of `arrays` replaced; the rest is unchanged."""
    there = rules.flatten(tree)
    for path, array in arrays.items():
        if path not in there or there[path].shape != array.shape:
            shape = list(there[path].shape) if path in there else "missing"
            raise UserError(
                f"encoder: {source} has {path} of shape {list(array.shape)}, which is {shape} in "
                "the learner; name an encoder that fits the config."
            )

    def replace(key_path, leaf):
        array = arrays.get(rules.path_string(key_path))
        return leaf if array is None else jax.device_put(array.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(replace, tree)
