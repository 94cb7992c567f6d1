"""The evaluators of a run, and the files of their results."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from cap_pretrain import evals, files, learners, untrusted
from cap_pretrain.data.sources.base import NoSplitError
from cap_pretrain.errors import UserError
from cap_pretrain.evals import exhibits
from cap_pretrain.evals.base import Context, Result


def check(config: ConfigDict) -> None:
    """Check all that the evaluators of a run need, in seconds and before anything is built.

    Each is constructed with an abstract learner and without a tokenizer. Raises UserError, which
    begins with the evaluator's section of the config.
    """
    if not config.evals:
        return
    learner = nnx.eval_shape(
        lambda: learners.build(config, config.text.vocab_size, jax.random.key(0))
    )
    mesh = AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    context = Context(config, nnx.graphdef(learner), None, mesh)
    for name, section in config.evals.items():
        options = evals.options(name, section)
        try:
            evals.evaluator_class(section.evaluator)(context, options)
        except UserError as error:
            message = f"evals.{name}: {str(error).removeprefix('evals: ')}"
            if isinstance(error, NoSplitError):
                message += f" Set data.eval_split or evals.{name}.split."
            raise UserError(message) from error


def newest_result(workdir: Path, name: str) -> tuple[Path | None, dict[str, Any]]:
    """Return the newest file of an evaluator's results and its content; None and {} without any.

    Raises UserError if it cannot be read.
    """
    found = files.numbered(workdir / "evals" / name, ".json")
    if not found:
        return None, {}
    path = found[max(found)]
    return path, untrusted.checked(files.read_json(path), "result", dict, path)


class Suite:
    """The evaluators of a run, each built on first use.

    Results go to `evals/NAME/STEP.json` in `workdir`, if `write` (whether this host does), with
    `weights`, the source of weights that were not trained in this run, as "step 300 of runs/cappa".
    """

    def __init__(self, context: Context, workdir: Path, *, write: bool = True, weights: str = ""):
        self._context, self._workdir, self._write = context, workdir, write
        self._weights = {"weights": weights} if weights else {}
        self._built: dict[str, Any] = {}

    def run(
        self, step: int, variables: Any, *, when: str, done: Collection[str] = ()
    ) -> Iterator[tuple[str, Result]]:
        """Run the evaluators that are due; yield each name and result as soon as it is there.

        Those have the given `when`: "always" or, afterwards, "end" (of the run). Those in `done`
        have run at this step and are skipped if their file has a result for the current options and
        weights.
        """
        for name, section in self._context.config.evals.items():
            path = self._workdir / "evals" / name / f"{step}.json"
            if section.when != when or (name in done and self._is_current(section, path)):
                continue
            if name not in self._built:
                cls = evals.evaluator_class(section.evaluator)
                self._built[name] = cls(self._context, evals.options(name, section))
            result = self._built[name](variables)
            if self._write:
                write_result(path, section, step, result, **self._weights)
                if result.exhibits:
                    exhibits.write(exhibits.path(self._workdir, name), step, result.exhibits)
            yield name, result

    def _is_current(self, section: ConfigDict, path: Path) -> bool:
        """Return whether the result at `path` is for these options and weights."""
        if not path.exists():
            return False
        try:
            found = files.read_json(path)
        except UserError:  # it is computed again
            return False
        options = json.loads(json.dumps(section.to_dict()))
        return (
            isinstance(found, dict)
            and found.get("options") == options
            and found.get("weights") == self._weights.get("weights")
        )


def write_result(path: Path, section: ConfigDict, step: int, result: Result, **about: str) -> None:
    """Write a result as JSON, atomically; `section` is the evaluator's entry in `config.evals`.

    Its metrics and details become keys of the file, and so does `about`, as `weights`.
    """
    content = {"step": step, "options": section.to_dict(), **about}
    content |= {**result.metrics, **result.details}
    files.write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
