"""Watch the metrics of every step, and the signals that ask a run to stop."""

import collections
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import jax
import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import files
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry.metrics import MetricsWriter
from cap_pretrain.telemetry.progress import Progress
from cap_pretrain.training.step import FINITE

# A loss is compared with the losses of so many previous steps, once there are at least that many.
SPIKE_WINDOW, SPIKE_MINIMUM = 100, 20
# The fraction of broken images is taken over so many examples, rounded up to whole steps.
BROKEN_WINDOW = 10_000
NO_REQUESTS = (False, False)  # What a host may request: to stop, and to save
# The standard deviation of a normal distribution in units of its median absolute deviation.
NORMAL_MAD = 1.4826


class Watch:
    """Checks the metrics of each step for non-finite values, loss spikes and broken images.

    The device runs one step ahead of the check. Nothing is saved unchecked. `config` has how many
    invalid steps may be skipped, the allowed fraction of broken images, and the threshold of a
    spike; `writer` receives spikes, and `data/ids` of every step.

    Attributes, equal on all hosts: `fault` is why the run must end after saving, "" while it may
    continue; `requests` is whether any host requested to stop, and to save, before the last step
    checked.
    """

    def __init__(
        self, config: ConfigDict, workdir: Path, writer: MetricsWriter, progress: Progress
    ):
        self._may_skip = config.optim.skip_bad_steps
        self._spikes, self._clips = config.log.spikes, bool(config.optim.clip_norm)
        self._workdir, self._writer, self._progress = workdir, writer, progress
        self._losses: collections.deque[float] = collections.deque(maxlen=SPIKE_WINDOW)
        self._window = -(-BROKEN_WINDOW // config.batch_size)  # steps
        # The count of broken images before the window and after each of its steps.
        self._broken: collections.deque[int] = collections.deque(maxlen=self._window + 1)
        self._may_break = config.data.max_broken
        self._batch_size = config.batch_size
        self.fault = ""
        self.requests = NO_REQUESTS
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def add(self, step: int, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Check the previous step, as `check`, and keep this one; return the metrics to log."""
        self.check()
        own = ("data/ids", "requests")  # read at every step, not only when metrics are logged
        names = (*FINITE, "skipped", "data/broken", *own)
        self._pending = (step, {name: metrics[name] for name in names if name in metrics})
        return {name: value for name, value in metrics.items() if name not in own}

    def check(self) -> None:
        """Check the step that was added last, waiting for the device to finish it.

        Raises UserError if a metric is not finite, and no more steps may be skipped.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = jax.device_get(metrics)
        stop, save = values.get("requests", NO_REQUESTS)
        self.requests = (bool(stop), bool(save))
        if "data/ids" in values:
            self._writer.write(step, {"data/ids": values["data/ids"]})
        self._count_broken(step, int(values.get("data/broken", 0)))
        bad = next((name for name in FINITE if not math.isfinite(values[name])), None)
        if bad is None:
            self._look_for_spike(step, float(values["loss"]))
            return
        skipped = int(values.get("skipped", 1))
        if skipped > self._may_skip:
            already = f" ({skipped - 1} such steps were skipped)" if self._may_skip else ""
            remedy = "Lower optim.lr or " + (
                "optim.clip_norm" if self._clips else "set optim.clip_norm"
            )
            folder = self._workdir / "checkpoints"
            left = (
                f"{folder} is intact" if files.numbered(folder) else "no checkpoint was saved yet"
            )
            raise UserError(
                f"step {step}: {bad} is {values[bad]}{already}; nothing was saved since. {remedy} "
                f"and start again: {left}."
            )
        self._progress.say(
            f"step {step}: {bad} is {values[bad]}; skipped, {skipped} of {self._may_skip} allowed"
        )

    def _count_broken(self, step: int, count: int) -> None:
        self._broken.append(count)
        recent = count - self._broken[0]
        # The whole window counts even at the beginning, so that a few early ones end no run.
        window = self._window * self._batch_size
        if recent > self._may_break * window:
            self.fault = (
                f"step {step}: {recent:,} of the last {window:,} examples did not decode, more "
                f"than data.max_broken={self._may_break:g} allows; they are listed in "
                f"{self._workdir / 'broken.jsonl'}."
                "\nThe run is saved: repair the dataset or allow more, and start again."
            )

    def _look_for_spike(self, step: int, loss: float) -> None:
        if self._spikes and len(self._losses) >= SPIKE_MINIMUM:
            median = float(np.median(self._losses))
            deviation = NORMAL_MAD * float(np.median(np.abs(np.subtract(self._losses, median))))
            if loss > median + self._spikes * deviation:
                self._writer.write(step, {"spike/loss": loss, "spike/median": median})
                self._progress.say(
                    f"step {step}: the loss spikes to {loss:.4f}, around {median:.4f} before"
                )
        self._losses.append(loss)


class StopRequest:
    """A context that records SIGTERM or SIGINT. A second signal ends the process at once."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._since = 0.0

    def is_set(self) -> bool:
        """Return whether a signal came."""
        return self.signal is not None

    def describe(self) -> str:
        """Return how long ago which signal came, as "3.4 s after SIGTERM"."""
        other = "" if self.signal else " on another host"
        number = self.signal or signal.SIGTERM
        return f"{time.monotonic() - self._since:.1f} s after {number.name}{other}"

    def notice(self) -> None:
        """Record that a signal came, to this host or another one."""
        self._since = self._since or time.monotonic()

    def __enter__(self) -> "StopRequest":
        self._before: dict[signal.Signals, Callable | int | None] = {
            number: signal.signal(number, self._handle) for number in self.SIGNALS
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self.notice()
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)


class Stopped(Exception):  # noqa: N818 - not an error
    """A signal stopped the run after it had saved; `exit_code` is 128 + its number, as usual."""

    def __init__(self, request: StopRequest, step: int):
        where = f"after step {step}, which is saved." if step else "while it was evaluating."
        other = "" if request.signal else " on another host"
        number = request.signal or signal.SIGTERM
        super().__init__(f"{number.name}{other}: stopped {where}")
        self.exit_code = 128 + number
