"""What a program shows while it works: lines, and the activity in progress.

`with doing("Training a tokenizer")` says what begins. While it lasts, a thread keeps the screen
alive: a terminal shows the activity and its duration in the last line, redrawn every second; a log
file gets a line after four seconds of silence, and after the first minute one every minute.

A process has one console, because it has one terminal; without `used`, nothing is shown. So code
of any layer can say what it does, and libraries and tests stay silent.
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol, TextIO

ERASE = "\r\x1b[K"  # return to the first column and clear the line

REDRAWN = 1.0
"""Seconds between redrawings of the last line of a terminal."""

SILENCE, LONG_SILENCE = 4.0, 60.0
"""Seconds of silence before a log file gets a line: in an activity's first minute, and later."""

EARLY = 60.0  # seconds


class Activity(Protocol):
    """Something in progress; `begun` is when, by `time.monotonic`."""

    begun: float

    def line(self, width: int) -> str:
        """Return a line about it for a terminal of so many columns; 0: for a log file."""


class Task:
    """An activity with a name and, perhaps, a known number of parts."""

    def __init__(self, text: str):
        self.begun = time.monotonic()
        self._text, self._done, self._total = text, 0, 0

    def advance(self, done: int, total: int) -> None:
        """Report that `done` of `total` parts are done."""
        self._done, self._total = done, total

    def line(self, width: int) -> str:
        """Return the name and duration; with parts also how many are done and the time left."""
        seconds = time.monotonic() - self.begun
        if not self._total:
            return f"{self._text}: {short_duration(seconds)}"
        text = f"{self._done:,} of {self._total:,} after {short_duration(seconds)}"
        if self._done:
            text += f", about {short_duration(seconds * (self._total / self._done - 1))} left"
        text += f": {self._text}"
        return f"{bar(self._done / self._total, 20)} {text}" if width else text


class Console:
    """Lines of output, and the activity in progress below them. All methods are thread-safe.

    `stream` is by default stdout. With `quiet`, as on all hosts of a cluster but the first, nothing
    is written.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stdout
        self.terminal = self._stream.isatty()
        self.quiet = False
        self._lock = threading.RLock()
        self._activities: list[Activity] = []
        self._drawn = False  # whether the last line of the terminal shows an activity
        self._spoken = time.monotonic()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def say(self, text: str) -> None:
        """Print lines of text."""
        with self._lock:
            self._write(f"{ERASE if self._drawn else ''}{text}\n")
            self._drawn = False
            self.draw()

    @contextlib.contextmanager
    def doing(self, text: str, *, say: bool = True) -> Iterator[Task]:
        """Show an activity while the context lasts. `say` prints a line as it begins."""
        if say:
            self.say(text)
        task = Task(text[:1].lower() + text[1:])
        self.begin(task)
        try:
            yield task
        finally:
            self.end(task)

    def begin(self, activity: Activity) -> None:
        """Show an activity, in place of those that began before, until `end`."""
        with self._lock:
            self._activities.append(activity)
            if self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="console", daemon=True)
                self._thread.start()
            self.draw()

    def end(self, activity: Activity) -> None:
        """Show an activity no longer."""
        with self._lock:
            if activity in self._activities:
                self._activities.remove(activity)
            if self._drawn:
                self._write(ERASE)
                self._drawn = False
                self.draw()

    def leave(self, activity: Activity) -> None:
        """Show an activity no longer, and leave its last line on the terminal."""
        with self._lock:
            if activity in self._activities:
                self.draw()
                self._write("\n" if self._drawn else "")
                self._drawn = False
                self._activities.remove(activity)

    def advance(self, done: int, total: int) -> None:
        """Report how many parts of the current task are done."""
        with self._lock:
            if self._activities and isinstance(self._activities[-1], Task):
                self._activities[-1].advance(done, total)

    def draw(self) -> None:
        """Redraw the last line of a terminal."""
        with self._lock:
            if not (self.terminal and self._activities):
                return
            width = shutil.get_terminal_size().columns - 1  # some wrap after a full line
            self._write(ERASE + self._activities[-1].line(width)[:width])
            self._drawn = True

    def close(self) -> None:
        """Leave the last line as it is and stop."""
        self._closed.set()
        with self._lock:
            self._activities.clear()
            if self._drawn:
                self._write("\n")
                self._drawn = False
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(timeout=REDRAWN)

    def _watch(self) -> None:
        """Keep the screen alive, until `close`."""
        while not self._closed.wait(REDRAWN / 4):
            try:
                self._tick()
            except (OSError, ValueError):  # the stream is closed; who writes next will say so
                return

    def _tick(self) -> None:
        with self._lock:
            if self._closed.is_set() or not self._activities:
                return
            now, activity = time.monotonic(), self._activities[-1]
            silent = now - self._spoken
            if self.terminal:
                if silent >= REDRAWN:
                    self.draw()
            elif silent >= (SILENCE if now - activity.begun < EARLY else LONG_SILENCE):
                self._write(f"  … {activity.line(0)}\n")

    def _write(self, text: str) -> None:
        if not self.quiet:
            self._stream.write(text)
            self._stream.flush()
        self._spoken = time.monotonic()


_current: Console | None = None  # the module's docstring says why there is one


@contextlib.contextmanager
def used(stream: TextIO | None = None) -> Iterator[Console]:
    """Use a console in this process while the context lasts, unless one is in use.

    `stream` is by default stdout.
    """
    global _current
    if _current is not None:
        yield _current
        return
    _current = console = Console(stream)
    try:
        yield console
    finally:
        _current = None
        console.close()


def current() -> Console | None:
    """Return the console in use."""
    return _current


def say(text: str) -> None:
    """Print lines of text if a console is in use."""
    if _current:
        _current.say(text)


def doing(text: str, *, say: bool = True) -> contextlib.AbstractContextManager[object]:
    """Return a context that shows an activity, see `Console.doing`, if a console is in use."""
    return _current.doing(text, say=say) if _current else contextlib.nullcontext()


def advance(done: int, total: int) -> None:
    """Report how many parts of the current activity are done."""
    if _current:
        _current.advance(done, total)


def bar(fraction: float, cells: int) -> str:
    """Return a bar of text: `bar(0.5, 8)` is "[####....]"."""
    full = int(min(max(fraction, 0.0), 1.0) * cells)
    return f"[{'#' * full}{'.' * (cells - full)}]"


def short_duration(seconds: float) -> str:
    """Format a duration with one unit, or two from an hour on: "8 s", "4 min", "2 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{seconds / 86400:.1f} days"
