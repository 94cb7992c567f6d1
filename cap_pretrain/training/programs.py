"""The compiled training step of each phase of a run."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.distributed import cluster, sharding
from cap_pretrain.distributed.ahead import Ahead
from cap_pretrain.training import plan
from cap_pretrain.training.phases import Phase
from cap_pretrain.training.step import TrainState, split_learner

StepFn = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Program:
    """The training step of a phase, jitted."""

    phase: Phase
    step_fn: StepFn

    def ahead(self, abstract: TrainState, mesh: Mesh) -> StepFn:
        """Return the step, which compiles in the background where that is safe.

        On GPUs and TPUs, what runs meanwhile could disturb the measurements of their compilers, and
        the hosts of a cluster compile together (see `cluster.compiled_everywhere`).
        """
        alone = jax.default_backend() == "cpu" and jax.process_count() == 1
        if not (alone and self.phase.stop and hasattr(self.step_fn, "lower")):
            return self.step_fn
        config = self.phase.config
        batch = plan.abstract_batch(config)
        count = (config.batch_size,)
        batch["broken"] = jax.ShapeDtypeStruct(count, np.bool_)
        if config.log.ids:
            batch["index"] = jax.ShapeDtypeStruct(count, np.int32)
        spread = sharding.batch_sharding(mesh)
        batch = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spread)
            for name, leaf in batch.items()
        }
        return Ahead(self.step_fn, abstract, batch, None)

    def compiled(self, *args: Any) -> StepFn:
        """Compile the step now, on all hosts, for a state, a batch and requests."""
        fn: Any = self.step_fn
        return cluster.compiled_everywhere(fn, *args)


def programs_of(
    phases: Sequence[Phase],
    make: Callable[[nnx.GraphDef, ConfigDict], StepFn],
    vocab_size: int,
    graphdef: nnx.GraphDef,
    abstract: TrainState,
) -> list[Program]:
    """Return the program of each phase.

    Args:
        phases: Phases of a run.
        make: Makes the training step for a learner's structure and a config.
        vocab_size: Number of tokens.
        graphdef: Structure of the learner of the run's config.
        abstract: Abstract state of the run, which all phases share.

    Raises:
        ValueError: The learner of a phase has other parameters. That is a mistake in the code.
    """
    programs = []
    for phase in phases:
        own = graphdef
        if phase.changed:
            build = lambda config=phase.config: learners.build(
                config, vocab_size, jax.random.key(0)
            )
            own, *variables = split_learner(nnx.eval_shape(build))
            if _shapes(variables) != _shapes([abstract.params, abstract.stats]):
                raise ValueError(f"{phase.describe()}: changes the parameters of the learner")
        programs.append(Program(phase, make(own, phase.config)))
    return programs


def program_at(programs: Sequence[Program], step: int) -> Program:
    """Return the program of the step after `step` steps; that of the last phase at the end."""
    return next((p for p in programs if step < p.phase.stop), programs[-1])


def _shapes(trees: Any) -> tuple[Any, list[tuple[tuple[int, ...], Any]]]:
    leaves, structure = jax.tree.flatten(trees)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
