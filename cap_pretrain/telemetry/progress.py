"""Console progress, durations and parameter tables for people."""

import math
import time
from collections.abc import Mapping
from typing import Any, TextIO

from cap_pretrain.telemetry import console
from cap_pretrain.telemetry.console import Console


class Progress:
    """Console progress: a bar redrawn in place on a terminal, one line per report in a log file.

    `mfu_label` is the name of `time/mfu`, see `flops.Peak`; `stream` is by default that of the
    console in use, or stdout.
    """

    def __init__(
        self, total_steps: int, *, mfu_label: str = "MFU", stream: TextIO | None = None
    ) -> None:
        self._total_steps, self._mfu_label = total_steps, mfu_label
        shared = None if stream else console.current()
        self._console, self._owned = shared or Console(stream), shared is None
        self._step = 0
        self._items: list[str] = []
        self._drawn_at = -math.inf
        self.begun = math.inf  # of the first step seen

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Report that `step` is done. Call it after every step.

        `metrics` are `train/loss` and `time/...`, shown until the next ones; without them only the
        bar moves, at most ten times a second.
        """
        self._step = step
        if self.begun == math.inf:
            self.begun = time.monotonic()
            self._console.begin(self)
        if metrics is not None:
            self._items = self._describe(metrics)
            if not self._console.terminal:
                self._console.say("  ".join([f"step {step}/{self._total_steps}", *self._items]))
        if metrics is not None or time.monotonic() - self._drawn_at > 0.1:
            self._console.draw()
            self._drawn_at = time.monotonic()

    def say(self, text: str) -> None:
        """Print lines of text, above the bar if there is one."""
        self._console.say(text)

    def close(self) -> None:
        """Leave the bar as it is and move to the next line."""
        self._console.leave(self)
        if self._owned:
            self._console.close()

    def line(self, width: int) -> str:
        """Return the bar and as many items as fit beside it, or for a log file the step."""
        text = f"{self._step}/{self._total_steps}"
        if not width:
            return f"step {text}"
        # Items that do not fit beside a bar of ten cells are left out.
        for item in self._items:
            if len(f"100% [] {text}  {item}") + 10 > width:
                break
            text += f"  {item}"
        fraction = min(self._step / max(self._total_steps, 1), 1.0)
        cells = min(max(width - len(f"100% [] {text}"), 10), 40)
        return f"{fraction:4.0%} {console.bar(fraction, cells)} {text}"

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
    from clu import parameter_overview  # takes a second to import

    return parameter_overview.get_parameter_overview(params, include_stats=False)
