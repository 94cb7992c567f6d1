"""Where the wall time of a run goes."""

import contextlib
import time
from collections.abc import Callable, Iterator


class StepTimer:
    """Where the wall time of a run goes, told once per log interval.

    Create it when the run starts. Around everything that is not a train step (building, restoring,
    evaluating, saving) say `with timer.pause():`, around the wait for a batch `with
    timer.data_wait():`, and `timer.step_done()` after each step. The first step compiles and is
    kept apart. Steps run asynchronously, so fetch a metric of the last step before `pause` and
    `report`, or the time of steps still in flight lands in the next interval.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        batch_size: int,
        flops_per_step: float | None = None,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`batch_size` and `peak_flops` (FLOP/s) are those of all devices together."""
        self._total_steps, self._batch_size = total_steps, batch_size
        self._flops_per_step, self._peak_flops = flops_per_step, peak_flops
        self._clock = clock
        self._created = clock()
        self._first_step_end: float | None = None
        self._compile_seconds: float | None = None
        self._steps_since_first = 0
        self._productive = 0.0
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._begun = self._clock()
        self._waited = self._paused = 0.0
        self._steps = 0

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        start = self._clock()
        yield
        self._paused += self._clock() - start

    def step_done(self) -> None:
        if self._first_step_end is None:
            self._first_step_end = self._clock()
            elapsed = self._first_step_end - self._begun
            self._compile_seconds = elapsed - self._waited - self._paused
            self._begin_interval()
        else:
            self._steps += 1
            self._steps_since_first += 1

    def report(self, step: int) -> dict[str, float]:
        """Ends an interval at `step` and returns its figures, `time/...`.

        step_ms          mean time of a step, waiting for data included
        data_wait_share  share of it in which the host waited for a batch: an upper bound of what
                         data costs, as the device may still have been busy meanwhile
        images_per_s     of all devices together
        mfu              model FLOP utilisation (see flops.py), if the peak is known
        eta_s            for the steps left, at the pace since the first step, pauses included
        goodput          share of all wall time since the start spent in steps, not waiting for
                         data, compiling, evaluating, saving or starting up
        compile_s        the first step, in the first report only

        An interval without a step besides the first has only the last one.
        """
        figures = {}
        if self._compile_seconds is not None:
            figures["time/compile_s"] = self._compile_seconds
            self._compile_seconds = None
        if self._steps:
            now = self._clock()
            seconds = now - self._begun - self._paused
            self._productive += seconds - self._waited
            pace = (now - self._first_step_end) / self._steps_since_first
            figures |= {
                "time/step_ms": 1000 * seconds / self._steps,
                "time/data_wait_share": self._waited / seconds,
                "time/images_per_s": self._batch_size * self._steps / seconds,
                "time/eta_s": pace * (self._total_steps - step),
                "time/goodput": self._productive / (now - self._created),
            }
            if self._flops_per_step and self._peak_flops:
                rate = self._flops_per_step * self._steps / seconds
                figures["time/mfu"] = rate / self._peak_flops
            self._begin_interval()
        return figures
