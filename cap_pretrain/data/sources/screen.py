"""What long work on a dataset shows, without knowing who watches."""

import contextlib
from typing import Protocol


class Screen(Protocol):
    """The part of `telemetry.console` that datasets use; the module itself is one."""

    def say(self, text: str) -> None:
        """Print lines of text."""

    def doing(self, text: str) -> contextlib.AbstractContextManager[object]:
        """Return a context that announces and shows an activity."""

    def advance(self, done: int, total: int) -> None:
        """Report how many parts of the current activity are done."""


class _Silent:
    def say(self, text: str) -> None:
        pass

    def doing(self, text: str) -> contextlib.AbstractContextManager[object]:
        del text
        return contextlib.nullcontext()

    def advance(self, done: int, total: int) -> None:
        pass


SILENT: Screen = _Silent()
