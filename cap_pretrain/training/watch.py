"""What the loop keeps an eye on: the figures of every step, and signals that ask it to stop."""

import collections
import math
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import jax
import numpy as np
from ml_collections import ConfigDict

from cap_pretrain.errors import UserError
from cap_pretrain.telemetry.metrics import MetricsWriter
from cap_pretrain.telemetry.progress import Progress
from cap_pretrain.training.step import FINITE

# Loss spikes are judged by so many steps before, once there are some.
SPIKE_WINDOW, SPIKE_MINIMUM = 100, 20
# Broken images are judged by so many examples, or a few more, as steps are whole.
BROKEN_WINDOW = 10_000
# What hosts may ask for, and none does: to stop, to save.
NOTHING = (False, False)
# The standard deviation of a normal distribution, in median absolute deviations.
NORMAL_MAD = 1.4826


class Watch:
    """Looks at the figures of each step: not finite, a spike, broken images, which examples came.

    The device runs one step ahead of the check, and nothing is saved unchecked.

    Args:
      config: gives how many bad steps may be skipped and images broken, what a spike is, whether
        ids are logged.
      workdir: for the message.
      writer, progress: where it is told.

    Attributes:
      fault: why the run is to end once it has saved; "" while it may go on. On all hosts the same.
      asked: whether any host has asked to stop, and to save, in the last step checked. Likewise.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        writer: MetricsWriter,
        progress: Progress,
    ):
        self._may_skip = config.optim.skip_bad_steps
        self._spikes = config.log.spikes
        self._workdir, self._writer, self._progress = workdir, writer, progress
        self._losses = collections.deque(maxlen=SPIKE_WINDOW)
        # The count of broken images after each step of the window, and before it.
        self._broken = collections.deque(maxlen=-(-BROKEN_WINDOW // config.batch_size) + 1)
        self._may_break = config.data.max_broken
        self._batch_size = config.batch_size
        self.fault = ""
        self.asked = NOTHING
        self._pending: tuple[int, dict[str, jax.Array]] | None = None

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Checks the step before, and remembers this one."""
        self.check()
        names = (*FINITE, "skipped", "data/ids", "data/broken", "asked")
        self._pending = (step, {name: metrics[name] for name in names if name in metrics})

    def check(self) -> None:
        """Checks the step remembered, waiting for it if need be.

        Raises:
          UserError: it is not finite, and no more may be skipped.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = jax.device_get(metrics)
        self.asked = tuple(map(bool, values.get("asked", NOTHING)))
        if "data/ids" in values:
            self._writer.write(step, {"data/ids": values["data/ids"]})
        self._count_broken(step, int(values.get("data/broken", 0)))
        bad = next((name for name in FINITE if not math.isfinite(values[name])), None)
        if bad is None:
            self._look_for_spike(step, float(values["loss"]))
            return
        skipped = int(values.get("skipped", 1))
        if skipped > self._may_skip:
            allowed = f" ({skipped - 1} such steps were skipped)" if self._may_skip else ""
            raise UserError(
                f"step {step}: {bad} is {values[bad]}{allowed}; nothing was saved since. Lower "
                "optim.lr or optim.clip_norm and start again: "
                f"{self._workdir / 'checkpoints'} is intact."
            )
        self._progress.say(
            f"step {step}: {bad} is {values[bad]}; skipped, {skipped} of {self._may_skip} allowed"
        )

    def _count_broken(self, step: int, count: int) -> None:
        self._broken.append(count)
        recent = count - self._broken[0]
        # Of a whole window even if it is not over, so that a few at the beginning end no run.
        window = (self._broken.maxlen - 1) * self._batch_size
        if recent > self._may_break * window:
            self.fault = (
                f"step {step}: {recent:,} of the last {window:,} examples did not decode, more "
                f"than data.max_broken={self._may_break:g} allows; they are listed in "
                f"{self._workdir / 'broken.jsonl'}."
                "\nThe run is saved: mend the dataset or allow more, and start again."
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
    """Remembers SIGTERM or SIGINT while active, instead of dying of it; the second one kills."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal: signal.Signals | None = None

    def is_set(self) -> bool:
        return self.signal is not None

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
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)


class Stopped(Exception):
    """A signal asked the run to stop, and what it had learned has been saved.

    Attributes:
      exit_code: 128 + the signal's number, as shells have it.
    """

    def __init__(self, request: StopRequest, step: int):
        where = f"after step {step}, which is saved." if step else "while it was evaluating."
        other = "" if request.signal else " on another host"
        number = request.signal or signal.SIGTERM
        super().__init__(f"{number.name}{other}: stopped {where}")
        self.exit_code = 128 + number
