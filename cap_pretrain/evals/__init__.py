"""Evaluators: what is measured of a learner, during training or after it.

An evaluator is a class with

  Options                     a frozen dataclass: its documented settings and defaults
  __init__(context, options)  builds what it needs once (see `Context`)
  __call__(variables)         measures the learner with these variables -> Result

A `Result` goes to metrics.jsonl, the console, TensorBoard and `evals/NAME/STEP.json`. To add an
evaluator, write its file and register it here; the loop need not know.
"""

import dataclasses
import importlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cap_pretrain import files, inputs, partition
from cap_pretrain.data import pipeline, prefetch, sources
from cap_pretrain.errors import UserError, did_you_mean

REGISTRY = {
    "loss": "cap_pretrain.evals.loss:Loss",
    "captions": "cap_pretrain.evals.captions:Captions",
    "caption_scores": "cap_pretrain.evals.caption_scores:CaptionScores",
    "scene_captions": "cap_pretrain.evals.scene_captions:SceneCaptions",
    "attention_mass": "cap_pretrain.evals.attention_mass:AttentionMass",
    "question_answers": "cap_pretrain.evals.question_answers:QuestionAnswers",
    "perplexity": "cap_pretrain.evals.perplexity:Perplexity",
    "zero_shot": "cap_pretrain.evals.zero_shot:ZeroShot",
    "retrieval": "cap_pretrain.evals.retrieval:Retrieval",
    "composition": "cap_pretrain.evals.composition:Composition",
    "linear_probe": "cap_pretrain.evals.linear_probe:LinearProbe",
    "few_shot": "cap_pretrain.evals.few_shot:FewShot",
    "knn": "cap_pretrain.evals.knn:KNearestNeighbours",
    "accuracy": "cap_pretrain.evals.accuracy:Accuracy",
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What an evaluator found.

    Attributes:
      figures: scalars.
      details: anything else that is JSON.
      lines: what people read on the console.
      pictures: uint8 images [H, W, 3] of one size with their captions, for TensorBoard.
    """

    figures: dict[str, float]
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

        return jax.jit(call, out_shardings=partition.replicated(self.mesh))

    def source(self, split: str = "", data: str = "") -> sources.Source:
        """Opens a split of a dataset; by default the run's own evaluation split."""
        return inputs.open_data(self.config, split or self.config.data.eval_split, data)

    def named(self, split: str = "", data: str = "") -> dict[str, str]:
        """What a result says of `source` with the same arguments."""
        section = self.config.data
        return {
            "dataset": data or sources.parse_mixture(section.name)[0][0],
            "split": split or section.eval_split,
        }

    def batches(self, source: sources.Source, batch_size: int, limit: int | None = None):
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
            rows=partition.batch_rows(self.mesh, batch_size),
        )
        batches = prefetch.iterate(dataset)
        try:
            for batch in batches:
                if self.stop():
                    raise Interrupted
                read = ("image", "text", "prompt", "label", "mask", "index")
                arrays = {k: batch[k] for k in read}
                arrays["index"] = arrays["index"].astype(np.int32)
                yield partition.put_batch(arrays, self.mesh), batch
        finally:
            batches.close()


def evaluator_class(name: str) -> type:
    """Returns the class registered as `name`; raises UserError for an unknown name."""
    if name not in REGISTRY:
        raise UserError(f"evals: no evaluator {name!r}.{did_you_mean(name, REGISTRY)}")
    module, _, cls = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def defaults(name: str, **overrides: Any) -> ConfigDict:
    """Returns an entry of `config.evals`: the evaluator's name and its options.

    Besides the evaluator's own options, `when` is "always" or "end" (of the run only).
    """
    when = overrides.pop("when", "always")
    options = evaluator_class(name).Options(**overrides)
    return ConfigDict({"evaluator": name, "when": when, **dataclasses.asdict(options)}).lock()


def options(name: str, section: ConfigDict) -> Any:
    """Returns the `Options` that the entry `name` of `config.evals` describes."""
    fields = section.to_dict()
    if fields.pop("when") not in ("always", "end"):
        raise UserError(f"evals.{name}.when: {section.when!r} is neither 'always' nor 'end'.")
    return evaluator_class(fields.pop("evaluator")).Options(**fields)


class Suite:
    """The evaluators of a run, each built when it is first needed.

    Args:
      context: what they work with.
      workdir: where the results go, as `evals/NAME/STEP.json`.
      write: whether this host writes them.
      weights: what is judged without having been trained here, as "step 300 of runs/cappa".
    """

    def __init__(self, context: Context, workdir: Path, *, write: bool = True, weights: str = ""):
        self._context, self._workdir, self._write = context, workdir, write
        self._weights = {"weights": weights} if weights else {}
        self._built: dict[str, Any] = {}

    def run(
        self, step: int, variables: Any, *, when: str, done: Collection[str] = ()
    ) -> Iterator[tuple[str, Result]]:
        """Runs those whose turn it is; yields each one's name and result at once.

        Args:
          step: at which the results are kept.
          variables: of the learner.
          when: whose turn it is: "always" or, after those, "end" (of the run).
          done: names of those that are passed over, if their result was made with the present
            options, of the same weights.
        """
        for name, section in self._context.config.evals.items():
            path = self._workdir / "evals" / name / f"{step}.json"
            if section.when != when or (name in done and self._made(section, path)):
                continue
            if name not in self._built:
                cls = evaluator_class(section.evaluator)
                self._built[name] = cls(self._context, options(name, section))
            result = self._built[name](variables)
            if self._write:
                write_result(path, section, step, result, **self._weights)
            yield name, result

    def _made(self, section: ConfigDict, path: Path) -> bool:
        """Whether the result at `path` is that of these options and weights."""
        if not path.exists():
            return False
        found = json.loads(path.read_text(encoding="utf-8"))
        options = json.loads(json.dumps(section.to_dict()))
        return found["options"] == options and found.get("weights") == self._weights.get("weights")


def write_result(path: Path, section: Mapping, step: int, result: Result, **about: str) -> None:
    """Writes a result as JSON, completely or not at all; raises OSError as `files.write_text`."""
    content = {"step": step, "options": section.to_dict(), **about}
    content |= {**result.figures, **result.details}
    files.write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
