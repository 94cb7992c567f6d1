"""Calls a tracker from a thread of its own, so that it can neither end nor delay a run."""

import os
import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cap_pretrain.telemetry.trackers.base import USER_INFO, Run, Tracker

MAX_WAITING = 2000
"""Calls that may wait for a slow tracker before it is given up; a report makes one or two."""

CLOSE_S = 60.0
"""Seconds that the end of a run waits for a tracker to send what is left."""

_SECRET_NAME = re.compile(r"KEY|TOKEN|PASSWORD|SECRET", re.IGNORECASE)
_SECRET_MIN = 6  # characters; a shorter value of such a variable ("1") is no secret
_LONGEST = 300  # characters of an error in a warning


class Guarded:
    """A tracker in a thread of its own.

    Figures that an earlier start of the run has sent are not sent again: a resumed run computes the
    same ones. A tracker whose run begins only now first gets the earlier figures. The first error
    is reported to `say` once, and the tracker gets nothing more.

    Args:
        name: Name of the tracker, for messages.
        tracker: The open tracker.
        run: The run.
        continues: Whether the tracker continues its run of an earlier start.
        say: Prints a line.
    """

    def __init__(
        self, name: str, tracker: Tracker, run: Run, continues: bool, say: Callable[[str], None]
    ):
        self._name, self._tracker, self._say = name, tracker, say
        self._error: BaseException | str | None = None
        self._given_up = False
        self._sent: dict[str, int] = {}
        self._calls: queue.Queue[tuple[Callable[..., None], tuple[Any, ...]] | None]
        self._calls = queue.Queue(MAX_WAITING)
        if continues:
            for line in run.lines:
                for tag in line:
                    self._sent[tag] = max(line["step"], self._sent.get(tag, -1))
        else:
            self._send(self._earlier, run)
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values that were not sent at this step; see `base.Tracker`."""
        fresh = {tag: value for tag, value in values.items() if step > self._sent.get(tag, -1)}
        if fresh:
            self._send(self._tracker.scalars, step, fresh)

    def text(self, step: int, tag: str, text: str) -> None:
        """Send a text, unless it was sent; see `base.Tracker`."""
        if step > self._last(tag):
            self._send(self._tracker.text, step, tag, text)

    def images(self, step: int, tag: str, images: np.ndarray, captions: Sequence[str]) -> None:
        """Send images, unless they were sent; see `base.Tracker`."""
        if step > self._last(tag):
            self._send(self._tracker.images, step, tag, np.array(images), list(captions))

    def close(self, failed: bool = False) -> None:
        """Send what is left, for at most `CLOSE_S`, and close the tracker."""
        self._send(self._tracker.close, failed)
        self._send(None)
        if self._given_up:
            return
        self._thread.join(CLOSE_S)
        if self._thread.is_alive() and not self._error:
            self._error = f"did not finish within {CLOSE_S:.0f} s of the end of the run"
        self._report()

    def _last(self, tag: str) -> int:
        """Return the last step at which an earlier start has sent figures of an evaluator."""
        return max((s for t, s in self._sent.items() if t.startswith(f"{tag}/")), default=-1)

    def _send(self, call: Callable[..., None] | None, *args: Any) -> None:
        self._report()
        if self._given_up:
            return
        try:
            self._calls.put_nowait((call, args) if call else None)
        except queue.Full:
            self._error = self._error or f"{MAX_WAITING} reports wait for it"
            self._report()

    def _report(self) -> None:
        """Print the first error, from the thread of the run, and give the tracker up."""
        if self._error is not None and not self._given_up:
            self._given_up = True
            error = one_line(self._error)
            self._say(f"{self._name}: failed and gets nothing more; the run goes on: {error}")

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            call, args = item
            try:
                call(*args)
            except BaseException as e:  # a run never ends because of its tracker
                self._error = e
                return

    def _earlier(self, run: Run) -> None:
        """Send the figures of an earlier start that had no such tracker."""
        for line in run.lines:
            if line["step"] <= run.keep_until:
                values = {k: v for k, v in line.items() if k != "step" and v is not None}
                self._tracker.scalars(line["step"], values)


def one_line(error: BaseException | str) -> str:
    """Return an error as one line, without passwords in URLs and values of secret variables."""
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    text = USER_INFO.sub("", " ".join(f"{kind}{error}".split()))
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SECRET_MIN:
            text = text.replace(value, "…")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
