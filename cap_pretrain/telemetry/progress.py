"""Console progress, durations and parameter tables for people."""

import math
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from clu import parameter_overview


class Progress:
    """Console progress: a bar redrawn in place on a terminal, one line per report in a log file.

    `mfu_label` is the name of `time/mfu`, see `flops.Peak`; `stream` is by default stdout.
    """

    def __init__(
        self, total_steps: int, *, mfu_label: str = "MFU", stream: TextIO | None = None
    ) -> None:
        self._total_steps, self._mfu_label = total_steps, mfu_label
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._step = 0
        self._items: list[str] = []
        self._bar_shown, self._drawn_at = False, -math.inf

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Report that `step` is done. Call it after every step.

        `metrics` are `train/loss` and `time/...`, shown until the next ones; without them only the
        bar moves, at most ten times a second.
        """
        self._step = step
        if metrics is not None:
            self._items = self._describe(metrics)
            if not self._terminal:
                self._print("  ".join([f"step {step}/{self._total_steps}", *self._items]) + "\n")
        if self._terminal and (metrics is not None or time.monotonic() - self._drawn_at > 0.1):
            self._draw()

    def say(self, text: str) -> None:
        """Print lines of text, above the bar if there is one."""
        self._print(f"{_ERASE if self._bar_shown else ''}{text}\n")
        if self._bar_shown:
            self._draw()

    def close(self) -> None:
        """Leave the bar as it is and move to the next line."""
        if self._bar_shown:
            self._draw()
            self._print("\n")
            self._bar_shown = False

    def _draw(self) -> None:
        """Redraw the bar and as many items as fit beside it."""
        width = shutil.get_terminal_size().columns - 1  # some terminals wrap after a full line
        fraction = min(self._step / max(self._total_steps, 1), 1.0)
        # Items that do not fit beside a bar of ten cells are left out.
        text = f"{self._step}/{self._total_steps}"
        for item in self._items:
            if len(f"100% [] {text}  {item}") + 10 > width:
                break
            text += f"  {item}"
        cells = min(max(width - len(f"100% [] {text}"), 10), 40)
        full = int(fraction * cells)
        line = f"{fraction:4.0%} [{'#' * full}{'.' * (cells - full)}] {text}"
        self._print(_ERASE + line[:width])
        self._bar_shown, self._drawn_at = True, time.monotonic()

    def _describe(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the metrics to show, formatted; the most important first."""
        forms = {
            "time/eta_s": lambda v: f"ETA {format_duration(v)}",
            "train/loss": lambda v: f"loss {v:.4f}",
            "time/images_per_s": lambda v: f"{v:,.0f} img/s",
            "time/step_ms": lambda v: f"{v:,.0f} ms/step",
            "time/data_wait_share": lambda v: f"data wait {v:.1%}",
            "time/mfu": lambda v: f"{self._mfu_label} {v:.1%}",
            "time/compile_s": lambda v: f"compiled in {v:.1f} s",
        }
        return [form(metrics[tag]) for tag, form in forms.items() if tag in metrics]

    def _print(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


_ERASE = "\r\x1b[K"  # return to the first column and clear the line


def format_duration(seconds: float) -> str:
    """Format a duration: 65 -> "1:05", 3665 -> "1:01:05", 100000 -> "1d 3:46:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    return f"{f'{days}d ' if days else ''}{hour}:{minute:02}:{second:02}"


def parameter_table(params: Mapping[str, Any]) -> str:
    """Return a table of name, shape, dtype and size, for nested dicts of (abstract) arrays."""
    return parameter_overview.get_parameter_overview(params, include_stats=False)
