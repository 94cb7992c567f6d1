"""The evaluators of a run, and the files of their results."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain import evals, files
from cap_pretrain.evals.base import Context, Result


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
                cls = evals.evaluator_class(section.evaluator)
                self._built[name] = cls(self._context, evals.options(name, section))
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
    content |= {**result.metrics, **result.details}
    files.write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
