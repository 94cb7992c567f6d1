"""Measuring how a run spends its wall time."""

import contextlib
import time
from collections.abc import Callable, Iterator


class StepTimer:
    """Measures how a run spends its wall time, reported once per log interval.

    Create it when the run starts. Use `with timer.pause():` around everything that is not a
    training step (building, restoring, evaluating, saving) and `with timer.data_wait():` around the
    wait for a batch, and call `timer.step_done()` after each step; the first, which compiles, is
    reported apart. Steps run asynchronously, so fetch a metric of the last step before `pause` and
    `report`, or the time of running steps counts toward the next interval. `batch_size`,
    `flops_per_step` (model FLOPs) and `peak_flops` are of all devices; without the latter two MFU
    is not reported. If steps differ, set `flops_per_step` where it changes; `flops_after` then
    returns the FLOPs of all steps after a given one.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        batch_size: int,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        flops_after: Callable[[int], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total_steps, self._batch_size = total_steps, batch_size
        self.flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._flops_after, self._flops_since_first = flops_after, 0.0
        self._clock = clock
        self._created = clock()
        self._first_step_end: float | None = None
        self._compile_seconds: float | None = None
        self.first_step_s = 0.0  # seconds of the first step, which compiles, once it is done
        self._steps_since_first = 0
        self._productive = self._all_paused = self._last_step_end = 0.0
        self._begin_interval()

    def _begin_interval(self) -> None:
        """Reset what is counted per interval."""
        self._begun = self._clock()
        self._waited = self._paused = self._flops = 0.0
        self._steps = 0

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Count the time inside the context as waiting for data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time inside the context from the step time."""
        start = self._clock()
        yield
        self._paused += self._clock() - start
        self._all_paused += self._clock() - start

    def step_done(self) -> None:
        """Count a training step."""
        if self._first_step_end is None:
            self._first_step_end = self._clock()
            elapsed = self._first_step_end - self._begun
            self.first_step_s = elapsed - self._waited - self._paused
            self._compile_seconds = self.first_step_s
            self._all_paused = 0.0
            self._begin_interval()
        else:
            self._steps += 1
            self._steps_since_first += 1
            self._flops += self.flops_per_step or 0.0
            self._flops_since_first += self.flops_per_step or 0.0
            self._last_step_end = self._clock() - self._first_step_end

    @property
    def seconds_per_step(self) -> float:
        """The mean duration of the steps after the first, pauses excluded; 0 before the second."""
        if not self._steps_since_first:
            return 0.0
        return (self._last_step_end - self._all_paused) / self._steps_since_first

    def report(self, step: int) -> dict[str, float]:
        """End an interval at `step` and return its metrics, `time/...`.

        step_ms          mean duration of a step, including the wait for data
        data_wait_share  fraction of it in which the host waited for a batch. This is an upper bound
                         of the cost of data, because the device may be busy meanwhile.
        images_per_s     of all devices together
        mfu              model FLOP utilization (see flops.py), if the peak is known
        eta_s            remaining time, at the pace since the first step including pauses; by
                         FLOPs if steps differ
        goodput          fraction of all wall time since the start spent in steps, as opposed to
                         waiting for data, compiling, evaluating, saving or starting up
        compile_s        duration of the first step, in the first report only

        An interval that has only the first step has only `compile_s`.
        """
        metrics = {}
        if self._compile_seconds is not None:
            metrics["time/compile_s"] = self._compile_seconds
            self._compile_seconds = None
        if self._steps and self._first_step_end is not None:
            now = self._clock()
            seconds = now - self._begun - self._paused
            self._productive += seconds - self._waited
            metrics |= {
                "time/step_ms": 1000 * seconds / self._steps,
                "time/data_wait_share": self._waited / seconds,
                "time/images_per_s": self._batch_size * self._steps / seconds,
                "time/eta_s": (now - self._first_step_end) * self._left(step),
                "time/goodput": self._productive / (now - self._created),
            }
            if self._flops and self._peak_flops:
                metrics["time/mfu"] = self._flops / seconds / self._peak_flops
            self._begin_interval()
        return metrics

    def _left(self, step: int) -> float:
        """Return the work after `step`, as a multiple of that since the first step."""
        if self._flops_after and self._flops_since_first:
            return self._flops_after(step) / self._flops_since_first
        return (self._total_steps - step) / self._steps_since_first
