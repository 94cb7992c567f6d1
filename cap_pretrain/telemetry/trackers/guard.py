"""Opens and calls a tracker in a separate thread, so that it can neither end nor delay a run."""

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cap_pretrain.telemetry.trackers.base import USER_INFO, Run, Tracker

MAX_WAITING = 2000
"""Calls that may wait for a slow tracker before it is given up; a report makes one or two."""

CLOSE_S = 60.0
"""Seconds that the end of a run waits for its trackers to send what is left."""

EARLY_S = 5.0
"""The same if an error or a signal ends the run: clusters kill it 30 s after SIGTERM, as Slurm."""

_SECRET_NAME = re.compile(r"KEY|TOKEN|PASSWORD|SECRET", re.IGNORECASE)
_SECRET_MIN = 6  # characters; a shorter value of such a variable ("1") is no secret
_LONGEST = 300  # characters of an error in a warning


class Guarded:
    """A tracker that is opened and called in a separate thread.

    Figures that an earlier start of the run has sent are not sent again: a resumed run computes the
    same ones. A tracker whose run begins only now first gets the earlier figures. The first error
    is reported to `say` once, and the tracker gets nothing more.

    Args:
        name: Name of the tracker, for messages.
        opening: Opens the tracker; returns it and whether it continues its run of an earlier start.
        run: The run.
        say: Prints a line.
    """

    def __init__(
        self,
        name: str,
        opening: Callable[[], tuple[Tracker, bool]],
        run: Run,
        say: Callable[[str], None],
    ):
        self._name, self._opening, self._run, self._say = name, opening, run, say
        self._error: BaseException | str | None = None
        self._is_open = self._given_up = False
        self._calls: queue.Queue[tuple[Any, ...]]  # name of the method, and its arguments
        self._calls = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send the values that were not sent at this step; see `base.Tracker`."""
        self._send("scalars", step, dict(values))

    def text(self, step: int, tag: str, text: str) -> None:
        """Send a text, unless it was sent; see `base.Tracker`."""
        self._send("text", step, tag, text)

    def images(self, step: int, tag: str, images: np.ndarray, captions: Sequence[str]) -> None:
        """Send images, unless they were sent; see `base.Tracker`."""
        self._send("images", step, tag, np.array(images), list(captions))

    def end(self, failed: bool) -> None:
        """Begin to send what is left and to close the tracker."""
        self._send("close", failed)

    def wait(self, seconds: float) -> None:
        """Wait until the tracker is closed, for at most `seconds`."""
        if self._given_up:
            return
        self._thread.join(max(seconds, 0))
        if self._thread.is_alive() and not self._error:
            self._error = "did not finish soon after the end of the run"
        self._report()

    def _send(self, *call: Any) -> None:
        self._report()
        if self._given_up:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._error = self._error or f"{MAX_WAITING} reports wait for it"
            self._report()

    def _report(self) -> None:
        """Print the first error, from the thread of the run, and give the tracker up."""
        if self._error is not None and not self._given_up:
            self._given_up = True
            what = "failed and gets nothing more"
            if not self._is_open:
                what = "could not be opened and gets nothing"
            self._say(f"{self._name}: {what}; the run goes on: {one_line(self._error)}")

    def _work(self) -> None:
        try:
            tracker, continues = self._opening()
            self._is_open = True
            sent = self._sent(tracker, continues)
            method = ""
            while method != "close":
                method, *args = self._calls.get()
                if method == "scalars":
                    step, values = args
                    args[1] = {tag: v for tag, v in values.items() if step > sent.get(tag, -1)}
                    fresh = bool(args[1])
                else:
                    fresh = method == "close" or args[0] > _last(sent, args[1])
                if fresh:
                    getattr(tracker, method)(*args)
        except BaseException as e:  # a run never ends because of its tracker
            self._error = e

    def _sent(self, tracker: Tracker, continues: bool) -> dict[str, int]:
        """Return the last step that was sent, by figure.

        A tracker that an earlier start did not have gets the figures of that start.
        """
        run, sent = self._run, dict[str, int]()
        if continues and run.trains:
            for line in run.lines:
                for tag in line:
                    sent[tag] = max(line["step"], sent.get(tag, -1))
        elif not continues:
            for line in run.lines:
                if line["step"] <= run.keep_until:
                    values = {k: v for k, v in line.items() if k != "step" and v is not None}
                    tracker.scalars(line["step"], values)
        return sent


def close(trackers: Sequence[Guarded], failed: bool) -> None:
    """Send what is left and close the trackers, for at most `CLOSE_S` or `EARLY_S` in all."""
    until = time.monotonic() + (EARLY_S if failed else CLOSE_S)
    for tracker in trackers:
        tracker.end(failed)
    for tracker in trackers:
        tracker.wait(until - time.monotonic())


def _last(sent: Mapping[str, int], tag: str) -> int:
    """Return the last step at which an earlier start has sent figures of an evaluator."""
    return max((s for t, s in sent.items() if t.startswith(f"{tag}/")), default=-1)


def one_line(error: BaseException | str) -> str:
    """Return an error as one line, without passwords in URLs and values of secret variables."""
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    text = USER_INFO.sub("", " ".join(f"{kind}{error}".split()))
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SECRET_MIN:
            text = text.replace(value, "…")
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
