"""Run the evaluators during a run, and report and remember what they find."""

from collections.abc import Callable, Collection, Iterator, Mapping

import jax
import numpy as np

from cap_pretrain.evals import fit
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.evals.suite import Budget, Suite
from cap_pretrain.optim import schedule as schedules
from cap_pretrain.optim.plateau import Memory, Plateau
from cap_pretrain.telemetry.metrics import MetricsWriter
from cap_pretrain.telemetry.progress import Progress
from cap_pretrain.training import history
from cap_pretrain.training.setup import Setup
from cap_pretrain.training.step import TrainState

MANY = 6
"""More figures than these are shown as a table."""


class Evaluation:
    """The evaluators of a run, and its plateau rule.

    `interrupt` is called before each batch and stops the evaluation if True; `weights` says, for
    the results, where weights come from that were not trained in this run; `pace` returns the
    seconds that a training example takes, or 0.
    """

    def __init__(
        self,
        setup: Setup,
        writer: MetricsWriter,
        progress: Progress,
        *,
        interrupt: Callable[[], bool],
        weights: str,
        pace: Callable[[], float],
    ):
        self._setup, self._writer, self._progress = setup, writer, progress
        self._plateau = Plateau.of(setup.config)
        self._is_main = jax.process_index() == 0
        context = Context(
            *(setup.config, setup.graphdef, setup.tokenizer, setup.mesh, interrupt, setup.workdir)
        )
        budget = Budget(_passes(setup), lambda: pace() / fit.PASSES)
        self._suite = Suite(
            context, setup.workdir, write=self._is_main, weights=weights, budget=budget
        )

    def run(
        self, state: TrainState, step: int, when: str, done: Collection[str] = ()
    ) -> Iterator[Memory | None]:
        """Run the evaluators of `when`, "always" or "end"; yield the plateau's memory after each.

        Averaged parameters are evaluated if there are any. Evaluators in `done` are skipped: their
        results at this step exist. Raises `evals.base.Interrupted` if `interrupt` returned True.
        """
        memory = state.plateau
        # Evaluators transfer their results to the host.
        with jax.transfer_guard_device_to_host("allow"):
            for name, result in self._suite.run(step, state.variables, when=when, done=done):
                metrics = {f"{name}/{k}": v for k, v in result.metrics.items()}
                memory = self._plateau.after(memory, step, metrics)
                self._report(step, name, result)
                yield memory
            config, schedule = self._setup.config, self._setup.schedule
            if self._is_main and schedule.total and config.evals:
                setup = self._setup
                epochs = lambda step: setup.batches.examples(step) / setup.epoch
                self._writer.flush()
                rows = history.keep(setup.workdir, config.evals, epochs)
                if when == "end":
                    self._progress.say(history.tables(rows))

    def remember(self, state: TrainState, step: int, metrics: Mapping[str, float]) -> TrainState:
        """Return the state after the plateau rule has seen metrics logged by an earlier process."""
        return state.replace(plateau=self._plateau.after(state.plateau, step, metrics))

    def ended(self, state: TrainState) -> bool:
        """Return whether the plateau rule ends the run."""
        return self._plateau.ended(state.plateau)

    def _report(self, step: int, name: str, result: Result) -> None:
        """Write the metrics of an evaluator and print them."""
        self._writer.write(step, {f"{name}/{k}": v for k, v in result.metrics.items()})
        lines = [f"step {step}  {name}: {figures(result.metrics)}", *result.lines]
        share = self._setup.config.optim.ema**step
        if step and share >= schedules.EMA_SHARE:
            weight = f"with a weight of {share:.0%}"
            lines.append(f"by averaged parameters, which contain the initial ones {weight}")
        self._progress.say("\n    ".join(lines))
        if result.pictures:
            images, captions = zip(*result.pictures, strict=True)
            self._writer.images(step, name, np.stack(images), captions)


def _passes(setup: Setup) -> dict[str, float]:
    """Return the forward passes of the training that evaluations belong to; see `fit`."""
    config, schedule = setup.config, setup.schedule
    if not (schedule.total and config.eval.fit):
        return {}
    steps = {"always": min(schedule.evaluate or schedule.total, schedule.total)}
    steps["end"] = schedule.total
    return {when: fit.PASSES * config.batch_size * n for when, n in steps.items()}


def figures(metrics: Mapping[str, float]) -> str:
    """Return metrics on one line, or as a table of two columns if there are more than `MANY`."""
    if len(metrics) <= MANY:
        return "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
    cells = [(name, f"{value:.4g}") for name, value in metrics.items()]
    half = -(-len(cells) // 2)
    parts = [cells[:half], cells[half:] + [("", "")] * (2 * half - len(cells))]
    widths = [[max(map(len, column)) for column in zip(*part, strict=True)] for part in parts]
    rows = (
        "    ".join(
            f"{name:{width}}  {value:>{digits}}"
            for (name, value), (width, digits) in zip(row, widths, strict=True)
        ).rstrip()
        for row in zip(*parts, strict=True)
    )
    return "\n    ".join(["", *rows])
