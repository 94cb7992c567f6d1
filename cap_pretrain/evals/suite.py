"""The evaluators of a run, and the files of their results."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from cap_pretrain import evals, files, learners, untrusted
from cap_pretrain.data.sources.base import NoSplitError, Source
from cap_pretrain.errors import UserError
from cap_pretrain.evals import exhibits, fit, members
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.telemetry import console

LONG = 5.0  # seconds; a longer evaluation is announced each time

TINY = 100
"""Fewer examples get a warning: an accuracy has a standard error of five points or more."""


@dataclasses.dataclass(frozen=True)
class _Checked(Context):
    """A context that notes the sizes of the sources that evaluators open."""

    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    def source(self, split: str = "", data: str = "") -> Source:
        source = super().source(split, data)
        self.sizes[str(source)] = len(source)
        return source


def check(config: ConfigDict) -> ConfigDict:
    """Check all that the evaluators of a run need, in seconds and before anything is built.

    Each is constructed with an abstract learner and without a tokenizer. Raises UserError, which
    begins with the evaluator's section of the config. Warns of tiny datasets on the console.

    Returns the config, with a section for each further dataset of a mixture (see `members`). Those
    that an evaluator cannot read are left out, which the console says.
    """
    if not config.evals:
        return config
    learner = nnx.eval_shape(
        lambda: learners.build(config, config.text.vocab_size, jax.random.key(0))
    )
    mesh = AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    context = _Checked(config, nnx.graphdef(learner), None, mesh)
    for name, section in config.evals.items():
        try:
            _build(context, name, section)
        except UserError as error:
            message = f"evals.{name}: {str(error).removeprefix('evals: ')}"
            if isinstance(error, NoSplitError):
                message += f" Set data.eval_split or evals.{name}.split."
            raise UserError(message) from error
    more = {}
    for name, section in members.sections(config).items():
        try:
            _build(context, name, section)
            more[name] = section
        except UserError as error:
            reason = str(error).removeprefix("evals: ").splitlines()[0]
            console.say(f"{section.data} is not evaluated as evals.{name}: {reason}")
    for source, size in context.sizes.items():
        if size < TINY:
            console.say(f"Warning: {source} has only {size:,} examples, so figures vary by chance.")
    if more:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.evals.update(more)
    return config


def _build(context: Context, name: str, section: ConfigDict) -> Any:
    return evals.evaluator_class(section.evaluator)(context, evals.options(name, section))


def newest_result(
    workdir: Path, name: str, step: int | None = None
) -> tuple[Path | None, dict[str, Any]]:
    """Return the newest file of an evaluator's results and its content; None and {} without any.

    With `step`, the file is that of the step. Raises UserError if it cannot be read.
    """
    found = files.numbered(workdir / "evals" / name, ".json")
    if not found or step not in (None, *found):
        return None, {}
    path = found[max(found) if step is None else step]
    return path, untrusted.checked(files.read_json(path), "result", dict, path)


class Budget(NamedTuple):
    """What evaluations may cost; by default anything.

    `passes` maps `when` to the forward passes of the training that an evaluation belongs to;
    `pass_s` returns the seconds that a forward pass takes, or 0 while that is unknown.
    """

    passes: Mapping[str, float] = {}
    pass_s: Callable[[], float] = float


class Suite:
    """The evaluators of a run, each built on first use.

    Results go to `evals/NAME/STEP.json` in `workdir`, if `write` (whether this host does), with
    `weights`, the source of weights that were not trained in this run, as "step 300 of runs/cappa".
    Where `budget` is too small for an evaluator's own defaults, it reads fewer examples (see
    `fit`), and the options in its results say how many.
    """

    def __init__(
        self,
        context: Context,
        workdir: Path,
        *,
        write: bool = True,
        weights: str = "",
        budget: Budget = Budget(),  # noqa: B008 - immutable
    ):
        self._context, self._workdir, self._write = context, workdir, write
        self._weights = {"weights": weights} if weights else {}
        self._budget = budget
        self._built: dict[str, tuple[Any, ConfigDict]] = {}  # and the section that it follows
        self._seconds: dict[str, float] = {}  # that the last evaluation took

    def run(
        self, step: int, variables: Any, *, when: str, done: Collection[str] = ()
    ) -> Iterator[tuple[str, Result]]:
        """Run the evaluators that are due; yield each name and result as soon as it is there.

        Those have the given `when`: "always" or, afterwards, "end" (of the run). Those in `done`
        have run at this step and are skipped if their file has a result for the current options and
        weights.
        """
        for name, section in self._context.config.evals.items():
            if section.when != when:
                continue
            path = self._workdir / "evals" / name / f"{step}.json"
            evaluator, section = self._prepared(name, section)
            if name in done and self._is_current(section, path):
                continue
            begun = time.monotonic()
            text, say = self._announced(name, fit.work_of(evaluator))
            with console.doing(text, say=say):
                result = evaluator(variables)
            self._seconds[name] = time.monotonic() - begun
            if self._write:
                write_result(path, section, step, result, **self._weights)
                if result.exhibits:
                    exhibits.keep(self._workdir, name, step, result.exhibits)
            yield name, result

    def _prepared(self, name: str, section: ConfigDict) -> tuple[Any, ConfigDict]:
        """Return an evaluator and its section, with the options that fit into the budget."""
        if name in self._built:
            return self._built[name]
        evaluator, options = _build(self._context, name, section), evals.options(name, section)
        work, sections = fit.work_of(evaluator), self._context.config.evals.values()
        sharing = sum(other.when == section.when for other in sections)
        budget = self._budget.passes.get(section.when, math.inf) / sharing
        fitting = fit.fitted(options, work, budget)
        if work and fitting != options:
            smaller = section.copy_and_resolve_references()
            with smaller.unlocked():
                smaller.update(dataclasses.asdict(fitting))
            try:
                evaluator, section = _build(self._context, name, smaller), smaller
                fewer = fit.work_of(evaluator) or work
                say = (
                    f"reads {fewer.images:,} of {work.images:,} examples, since all would take "
                    "longer than the training between evaluations (--config.eval.fit=False: all)."
                )
            except UserError as error:  # as of a probe, with too few examples for its classes
                reason = str(error).splitlines()[0]
                say = f"reads all {work.images:,} examples, since fewer do not suffice: {reason}"
            console.say(f"evals.{name} {say}")
        self._built[name] = evaluator, section
        return evaluator, section

    def _announced(self, name: str, work: fit.Work | None) -> tuple[str, bool]:
        """Return what is said of an evaluation as it begins, and whether it needs a line."""
        text = f"Evaluating {name}"
        if work:
            text += f" on {work.images:,} examples"
        known = self._seconds.get(name, 0.0)
        seconds = known or (work.passes(work.images) * self._budget.pass_s() if work else 0.0)
        if seconds:
            text += f", about {console.short_duration(seconds)}"
        return text, not known or known > LONG

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
