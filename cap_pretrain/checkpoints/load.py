"""Loading the trained learner of a run from its workdir, for captioning, evaluation and export."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import files, inputs, learners, rules, untrusted
from cap_pretrain.checkpoints.folders import saved_steps
from cap_pretrain.checkpoints.manifest import CorruptCheckpointError
from cap_pretrain.checkpoints.stored import load_arrays, saved_batches, saved_identity
from cap_pretrain.data.text import tokenizers
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.learners.protocols import learner_type
from cap_pretrain.models.build import check_device
from cap_pretrain.optim.schedule import BatchSizes
from cap_pretrain.training.step import split_learner
from cap_pretrain.validation import validate

Say = Callable[[str], None]


def to_stderr(text: str) -> None:
    """Print `text` to stderr, leaving stdout to results."""
    print(text, file=sys.stderr)


class Weights(NamedTuple):
    """The variables of a learner on this host, by path in the learner."""

    step: int  # of the checkpoint
    averaged: bool  # `params` are the moving average of the parameters
    params: dict[str, np.ndarray]  # such as "encoder/blocks/…"
    stats: dict[str, np.ndarray]  # other variables, such as BatchNorm statistics


class Learner(NamedTuple):
    """A restored learner in the form that evaluators take.

    The config is locked. `nnx.merge(graphdef, *variables)` is the module; `variables` are its
    parameters (averaged ones if saved) and its other variables, on the mesh.
    """

    config: ConfigDict
    tokenizer: tokenizers.Tokenizer
    graphdef: nnx.GraphDef
    variables: tuple[Any, Any]

    def able(self, protocol: type, part: str = "") -> "Learner | None":
        """Return the learner, or a part of it as a learner, that has the methods of a protocol.

        None if neither has; see `learners.able`. Raises UserError if the learner has no such part.
        """
        kind = learner_type(self.graphdef)
        found = learners.able(self.config, protocol, part, kind)
        if found is None or not found.name:
            return found and self
        graphdef, *variables = split_learner(found.of(nnx.merge(self.graphdef, *self.variables)))
        return Learner(found.config, self.tokenizer, graphdef, (variables[0], variables[1]))


def load_learner(
    workdir: str | Path, mesh: Mesh | None = None, step: int | None = None, say: Say = to_stderr
) -> Learner:
    """Load a run's learner, without its optimizer. The workdir is not changed.

    `mesh` holds the variables, by default the first device of this process; `step` and `say` are
    those of `read_weights`. Raises UserError if the run or a valid checkpoint is missing, or if
    its config.json or tokenizer is not the one it was trained with.
    """
    workdir = files.place(workdir)
    config = read_config(workdir)
    weights = read_weights(workdir, step, say)
    tokenizer = _open_tokenizer(config, workdir, weights.step)
    where = f"{workdir}: the checkpoint of step {weights.step}"
    return assemble(config, tokenizer, weights.params, weights.stats, (where, mesh))


def assemble(
    config: ConfigDict,
    tokenizer: tokenizers.Tokenizer,
    params: dict[str, np.ndarray],
    stats: dict[str, np.ndarray],
    place: tuple[str, Mesh | None],
) -> Learner:
    """Return the learner of a config with these variables, by path in the learner.

    `place` is where they come from, for messages, and the mesh that will hold them, by default the
    first device of this process. Raises UserError if they are not those of the learner.
    """
    where, mesh = place
    mesh = mesh or make_mesh(jax.local_devices()[:1])

    def build() -> nnx.Module:
        return learners.build(config, tokenizer.vocab_size, jax.random.key(0))

    check_device(config)
    with untrusted.parsing(where):
        graphdef, abstract, others = split_learner(nnx.eval_shape(build))
    shardings = sharding.param_shardings(abstract, mesh, config.mesh.rules)
    whole = jax.tree.map(lambda _: sharding.replicated(mesh), others)
    variables = (
        _placed(abstract, params, shardings, where),
        _placed(others, stats, whole, where),
    )
    return Learner(config, tokenizer, graphdef, variables)


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """Return a mesh over which batches are split and parameters are whole on each device."""
    axes = ("data", "fsdp", "tensor")
    grid = np.array(devices).reshape(-1, 1, 1)
    return Mesh(grid, axes, axis_types=(AxisType.Auto,) * len(axes))


def read_config(workdir: str | Path) -> ConfigDict:
    """Return the config of a run, locked, with defaults for newer fields; may raise UserError."""
    path = files.place(workdir) / "config.json"
    if not path.is_file():
        raise UserError(
            f"{workdir}: is not the folder of a run: its config.json cannot be read (no such "
            "file); give the --workdir of a run."
        )
    try:
        with untrusted.parsing(path):
            stored = untrusted.checked(files.read_json(path), "config", dict, path)
            learner = untrusted.entry(stored, "learner", dict, path)
            config = configs.default()
            with config.unlocked():
                untrusted.entry(learner, "name", str, path)
                config.learner = learners.defaults_like(learner)
                config.update(stored)
            validate(config.lock(), tokenizer=True)
    except UserError as e:
        reason = str(e).removeprefix(f"{path}: ").rstrip(".")
        raise UserError(
            f"{path}: is not the config of a run ({reason}); put the original back."
        ) from e
    return config


def read_batch_sizes(workdir: Path) -> tuple[int, BatchSizes]:
    """Return the step of the newest checkpoint and the batch sizes up to there.

    A checkpoint with an unreadable manifest is skipped. If there is none, the step is 0. Raises
    UserError if the sizes are those of a config that cannot be read.
    """
    for step in reversed(saved_steps(workdir)):
        try:
            found = saved_batches(workdir, step)
        except CorruptCheckpointError:
            continue
        if not found:  # a checkpoint of before 0.2
            before = workdir / f"config.until_{step}.json"
            path = before if before.is_file() else workdir / "config.json"
            if path.is_file():
                size = untrusted.entry(files.read_json(path), "batch_size", int, path)
                found = ((0, untrusted.bounded(size, "batch_size", 1, 2**31 - 1, path)),)
        return step, BatchSizes(found)
    return 0, BatchSizes(())


def read_weights(workdir: str | Path, step: int | None = None, say: Say = to_stderr) -> Weights:
    """Read and validate the learner's variables, with averaged parameters if the run kept them.

    `step` is by default that of the newest valid checkpoint; corrupt ones are skipped, with a line
    to `say`. Raises UserError if the checkpoint is missing, or none is valid.
    """
    steps = saved_steps(workdir)
    if not steps or step not in (None, *steps):
        there = f"there are {', '.join(map(str, steps))}" if steps else "there are none at all"
        which = "" if step is None else f" of step {step}"
        raise UserError(f"{workdir}: has no checkpoint{which}; {there}.")
    for candidate in reversed(steps) if step is None else [step]:
        try:
            arrays = load_arrays(workdir, candidate, items=("learner",))
        except CorruptCheckpointError as e:
            say(f"{e}; skipped.")
            continue
        averaged = any(path.startswith("learner/ema/") for path in arrays)
        kinds = ("ema" if averaged else "params", "stats")
        return Weights(candidate, averaged, *(_under(f"learner/{k}/", arrays) for k in kinds))
    raise UserError(f"{workdir}: every requested checkpoint is corrupt; put a valid one back.")


def _under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays below `prefix`, by the rest of their paths."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _open_tokenizer(config: ConfigDict, workdir: Path, step: int) -> tokenizers.Tokenizer:
    """Open the run's tokenizer; raise UserError unless it is the one saved with `step`."""
    if "text" not in learners.reads(config):
        return tokenizers.NoText()
    path = inputs.tokenizer_path(workdir)
    tokenizer = inputs.open_tokenizer(config, path)
    if inputs.tokenizer_identity(workdir) != saved_identity(workdir, step):
        raise UserError(
            f"{path}: is not the file that the run was trained with; put the original back."
        )
    return tokenizer


def _placed(tree: Any, arrays: dict[str, np.ndarray], shardings: Any, where: str) -> Any:
    """Return `arrays` (by path) on devices, in the structure of the abstract `tree`."""

    def place(key_path, leaf, sharding):
        path = rules.path_string(key_path)
        array = arrays.get(path)
        if array is None or array.shape != leaf.shape:
            found = "missing" if array is None else f"of shape {list(array.shape)}"
            raise UserError(
                f"{where} does not fit the model in config.json: {path} is {found} instead of "
                f"{list(leaf.shape)}. Put the original config.json back."
            )
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: array[index])

    if surplus := arrays.keys() - rules.flatten(tree).keys():
        raise UserError(
            f"{where} does not fit the model in config.json, which has no {min(surplus)}. Put "
            "the original config.json back."
        )
    return jax.tree_util.tree_map_with_path(place, tree, shardings)
