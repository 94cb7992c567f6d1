"""What a run begins with other than chance: `config.encoder`, a workdir or an imported encoder.

Of a workdir it is the newest sound checkpoint, or that of a step, as runs/cappa/checkpoints/300.

A learner that has an encoder gets that encoder's weights, and the fields of `config.model` and
`data.image_size` that go with them. The learner `pretrained` is whatever is found there: the whole
learner of a workdir, or the bare encoder; it is for evaluation, on the data of that workdir if
`data.name` is empty.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import convert, inputs, learners, rules
from cap_pretrain.checkpoints.load import read_config, read_weights
from cap_pretrain.errors import UserError
from cap_pretrain.training.step import TrainState

# Fields of `config.model` that are no properties of an encoder's weights.
OWN_FIELDS = (
    *("decoder_width", "decoder_depth", "decoder_mlp", "decoder_heads"),
    *("attention", "remat", "unroll", "logit_chunks", "dropout", "stochastic_depth"),
)


@dataclasses.dataclass(frozen=True)
class Initial:
    """Arrays that take the place of initial ones.

    Attributes:
      params: parameters by path in the learner.
      stats: other variables by path.
      source: where they are from, for people.
    """

    params: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    source: str

    def put(self, state: TrainState) -> TrainState:
        """Returns `state` with the arrays in their places, laid out as what they replace.

        Raises:
          UserError: the learner has no such parameter, or one of another shape.
        """
        params = _replaced(state.params, self.params, self.source)
        ema = None if state.ema is None else jax.tree.map(lambda p: p.copy(), params)
        stats = _replaced(state.stats, self.stats, self.source)
        return state.replace(params=params, stats=stats, ema=ema)


def resolve(config: ConfigDict) -> tuple[ConfigDict, Initial | None]:
    """Returns the config with what `config.encoder` settles, and the arrays it holds.

    Without `encoder` that is the config as it is, and None.

    Raises:
      UserError: there is no encoder at that path, or no sound checkpoint.
    """
    if not config.encoder:
        if config.learner.name == "pretrained":
            raise UserError("encoder: is empty; give --config.encoder=PATH, what to evaluate.")
        return config, None
    path = Path(config.encoder)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        workdir, step = _which_run(path)
        if (workdir / "config.json").is_file() and (workdir / "checkpoints").is_dir():
            initial = _from_workdir(config, workdir, step)
        else:
            initial = _from_elsewhere(config, path)
    return config.lock(), initial


def _which_run(path: Path) -> tuple[Path, int | None]:
    """Splits runs/a/checkpoints/300 into runs/a and 300; of runs/a it is the newest, None."""
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    return path, None


def _from_workdir(config: ConfigDict, workdir: Path, step: int | None) -> Initial:
    then = read_config(workdir)
    whole = config.learner.name == "pretrained"
    own = {} if whole else {name: config.model[name] for name in OWN_FIELDS}
    config.model.update({**then.model, **own})
    if whole and not config.data.name:
        own_data = {"workers": config.data.workers, "dir": config.data.dir}
        config.data.update({**then.data.to_dict(), **own_data})
    config.data.image_size = then.data.image_size
    if whole:
        config.learner = then.learner
        config.text.update(then.text)
        tokenizer = inputs.tokenizer_path(workdir)
        config.text.tokenizer = str(tokenizer) if tokenizer.is_file() else ""
    step, _, *arrays = read_weights(workdir, step)
    if not whole:
        arrays = [{k: v for k, v in part.items() if k.startswith("encoder/")} for part in arrays]
    return Initial(*arrays, f"step {step} of {workdir}")


def _from_elsewhere(config: ConfigDict, path: Path) -> Initial:
    found = convert.open_encoder(path)
    usual = {k: v for k, v in configs.default().model.items() if k not in OWN_FIELDS}
    config.model.update(usual | found.model)
    config.data.image_size = found.image_size or config.data.image_size
    if config.learner.name == "pretrained":
        config.learner = learners.defaults("encoder")
    params, stats = (
        {f"encoder/{path}": array for path, array in rules.flatten(tree).items()}
        for tree in (found.params, found.stats)
    )
    return Initial(params, stats, found.source)


def _replaced(tree: Any, arrays: dict[str, np.ndarray], source: str) -> Any:
    there = rules.flatten(tree)
    for path, array in arrays.items():
        if path not in there or there[path].shape != array.shape:
            shape = list(there[path].shape) if path in there else "missing"
            raise UserError(
                f"encoder: {source} has {path} of shape {list(array.shape)}, which is {shape} in "
                "the learner; they do not fit."
            )

    def replace(key_path, leaf):
        array = arrays.get(rules.path_string(key_path))
        return leaf if array is None else jax.device_put(array.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(replace, tree)
