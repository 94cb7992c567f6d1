"""What evaluators are given and what they return."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cap_pretrain import inputs
from cap_pretrain.data import pipeline, prefetch
from cap_pretrain.data.sources.base import Source, parse_mixture
from cap_pretrain.distributed import sharding


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluator found.

    Attributes:
      metrics: scalars.
      details: anything else that is JSON.
      lines: what people read on the console.
      pictures: uint8 images [H, W, 3] of one size with their captions, for TensorBoard.
    """

    metrics: dict[str, float]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    lines: tuple[str, ...] = ()
    pictures: tuple[tuple[np.ndarray, str], ...] = ()


class Interrupted(Exception):
    """An evaluation was given up, since the run is to stop."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What evaluators work with.

    Attributes:
      config: the run's configuration.
      graphdef: the learner's structure; `nnx.merge(graphdef, *variables)` is the learner.
      tokenizer: encodes and decodes text.
      mesh: where to compute.
      stop: whether to end early, asked before each batch.
      workdir: the run's folder, where evaluators may keep what took long to compute; None: nowhere.
    """

    config: ConfigDict
    graphdef: nnx.GraphDef
    tokenizer: Any
    mesh: Mesh
    stop: Callable[[], bool] = lambda: False
    workdir: Path | None = None

    def jit(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles `fn(learner, *arrays)` into a function of `(variables, *arrays)`.

        Its results are on every host in whole.
        """

        def call(variables, *args):
            return fn(nnx.merge(self.graphdef, *variables), *args)

        return jax.jit(call, out_shardings=sharding.replicated(self.mesh))

    def source(self, split: str = "", data: str = "") -> Source:
        """Opens a split of a dataset; by default the run's own evaluation split."""
        return inputs.open_data(self.config, split or self.config.data.eval_split, data)

    def named(self, split: str = "", data: str = "") -> dict[str, str]:
        """What a result says of `source` with the same arguments."""
        section = self.config.data
        return {
            "dataset": data or parse_mixture(section.name)[0][0],
            "split": split or section.eval_split,
        }

    def batches(self, source: Source, batch_size: int, limit: int | None = None):
        """Iterates over `(batch on the devices, the same batch on this host)`, each example once.

        The batch size is rounded up to what the mesh divides.

        Raises:
          Interrupted: `stop` says so.
        """
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        batch_size = -(-batch_size // ways) * ways
        dataset = pipeline.eval_batches(
            source,
            self.tokenizer,
            image_size=self.config.data.image_size,
            batch_size=batch_size,
            crop="none" if self.config.data.crop == "none" else "center",
            limit=limit,
            rows=sharding.batch_rows(self.mesh, batch_size),
        )
        batches = prefetch.iterate(dataset)
        try:
            for batch in batches:
                if self.stop():
                    raise Interrupted
                read = ("image", "text", "prompt", "label", "mask", "index")
                arrays = {k: batch[k] for k in read}
                arrays["index"] = arrays["index"].astype(np.int32)
                yield sharding.put_batch(arrays, self.mesh), batch
        finally:
            batches.close()
