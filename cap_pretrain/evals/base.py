"""The interface of evaluators: what they are given, what they return, and common options."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cap_pretrain import inputs, learners
from cap_pretrain.data import pipeline, prefetch
from cap_pretrain.data.sources.base import Source, parse_mixture
from cap_pretrain.distributed import sharding
from cap_pretrain.evals.exhibits import Exhibit
from cap_pretrain.learners import Member
from cap_pretrain.learners.protocols import learner_type
from cap_pretrain.telemetry import console


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of an evaluation: metrics by name, and what else is recorded or shown.

    `details` can be written as JSON; `lines` are text for the console; `pictures`, for TensorBoard,
    are uint8 images [H, W, 3] of one size with their captions; `exhibits`, for the run's report,
    are examples at the images' own resolution.
    """

    metrics: dict[str, float]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    lines: tuple[str, ...] = ()
    pictures: tuple[tuple[np.ndarray, str], ...] = ()
    exhibits: tuple[Exhibit, ...] = ()


class Interrupted(Exception):  # noqa: N818 (control flow: the run is stopping, nothing failed)
    """The evaluation was abandoned because the run is stopping."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What evaluators work with; `nnx.merge(graphdef, *variables)` is the whole learner.

    `stop` says whether to abandon the evaluation, and is called before each batch.
    """

    config: ConfigDict
    graphdef: nnx.GraphDef
    tokenizer: Any  # None until there is one
    mesh: Any  # to compute on, a Mesh; abstract where nothing is computed
    stop: Callable[[], bool] = lambda: False
    workdir: Path | None = None  # of the run, where evaluators may cache; None: no cache
    member: Member | None = None  # the part of the learner that is evaluated; None: all of it

    @property
    def kind(self) -> type:
        """The class of the learner, or of the part that is evaluated."""
        return self.member.kind if self.member else learner_type(self.graphdef)

    @property
    def part(self) -> str:
        """The name of the part that is evaluated; "" is the whole learner."""
        return self.member.name if self.member else ""

    def able(self, protocol: type, part: str = "") -> "Context | None":
        """Return the context of the learner, or of a part of it, that has a protocol's methods.

        None if neither has; see `learners.able`. Raises UserError if `part` is unknown.
        """
        found = learners.able(self.config, protocol, part, self.kind)
        if found is None or not found.name:
            return found and self
        found = found._replace(name=f"{self.part}/{found.name}".strip("/"))
        return dataclasses.replace(self, config=found.config, member=found)

    def merged(self, variables: Any) -> Any:
        """Return the learner, or its part, with these variables of the whole learner."""
        learner = nnx.merge(self.graphdef, *variables)
        return self.member.of(learner) if self.member else learner

    def jit(self, fn: Callable[..., Any], *, hasty: bool = False) -> Callable[..., Any]:
        """Compile `fn(learner, *arrays)` into `(variables, *arrays) -> results on every host`.

        With `hasty`, on CPUs, it compiles in a third of the time and runs slower: for few examples.
        """

        def call(variables, *args):
            return fn(self.merged(variables), *args)

        lazy = hasty and jax.default_backend() == "cpu"
        options = {"xla_backend_optimization_level": 0} if lazy else None
        whole = sharding.replicated(self.mesh)
        return jax.jit(call, out_shardings=whole, compiler_options=options)

    def source(self, split: str = "", data: str = "") -> Source:
        """Open a split of a dataset; by default the run's own evaluation split."""
        return inputs.open_data(self.config, split or self.config.data.eval_split, data)

    def named(self, split: str = "", data: str = "") -> dict[str, str]:
        """Return the `dataset` and `split` of `source(split, data)`, for `Result.details`."""
        section = self.config.data
        return {
            "dataset": data or parse_mixture(section.name)[0][0],
            "split": split or section.eval_split,
        }

    def batches(
        self, source: Source, batch_size: int, limit: int | None = None
    ) -> Iterator[tuple[dict[str, jax.Array], dict[str, np.ndarray]]]:
        """Iterate over `(batch on the devices, the same batch on this host)`, each example once.

        `batch_size` is rounded up to a multiple of the data-parallel devices; `limit` takes only
        the first so many examples. Raises Interrupted if the run is stopping.
        """
        batch_size = round_up(batch_size, data_parallel(self.mesh))
        dataset = pipeline.eval_batches(
            source,
            self.tokenizer,
            view=inputs.view(self.config),
            batch_size=batch_size,
            limit=limit,
            regions=(regions := inputs.regions_read(self.config)),
            rows=sharding.batch_rows(self.mesh, batch_size).tolist(),
        )
        batches, count = prefetch.iterate(dataset), min(limit or len(source), len(source))
        try:
            for number, batch in enumerate(batches):
                console.advance(min(number * batch_size, count), count)
                if self.stop():
                    raise Interrupted
                read = ["image", "text", "prompt", "label", "mask", "index"]
                read += ["phrases", "boxes"] if regions else []
                arrays = {k: batch[k] for k in read}
                arrays["index"] = arrays["index"].astype(np.int32)
                yield sharding.put_batch(arrays, self.mesh), batch
        finally:
            batches.close()


class Evaluator(Protocol):
    """What a class in `evals.REGISTRY` has; the fields of `Options` are those of `config.evals`."""

    Options: ClassVar[type]

    def __init__(self, context: Context, options: Any):
        """Check all that evaluations need; raise UserError if learner, data or options do not fit.

        That is: splits, captions or labels, class names, files, packages. It is also called before
        a run begins (see `suite.check`), so it must not use the tokenizer, which does not exist
        then, and must not take longer than a second.
        """

    def __call__(self, variables: Any) -> Result:
        """Evaluate the learner with these variables."""


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The dataset ("" is the run's own) and split ("" is `data.eval_split`) that is read."""

    data: str = ""
    split: str = ""


@dataclasses.dataclass(frozen=True)
class BatchOptions(DataOptions):
    """Options for reading examples in batches; `limit` takes only the first so many, 0 all."""

    batch_size: int = 128
    limit: int = 0


@dataclasses.dataclass(frozen=True)
class PartOptions:
    """The part of a joint learner that is evaluated; "" chooses one that can."""

    part: str = ""


@dataclasses.dataclass(frozen=True)
class ScoringOptions(PartOptions, BatchOptions):
    """Options for scoring texts (see `inference.scoring`); captioners score `pairs` at once.

    In a joint learner, `part` scores; "" is a part that embeds texts, as SigLIP, if there is one.
    """

    batch_size: int = 64
    pairs: int = 512


def data_parallel(mesh: Mesh) -> int:
    """Return over how many devices a mesh splits a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def round_up(number: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple
