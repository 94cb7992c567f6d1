"""What a run tells about itself: metrics files, console progress, where the time went, tables."""

import contextlib
import json
import math
import numbers
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from clu import parameter_overview

from cap_pretrain import files


class MetricsWriter:
    """Appends metrics to `metrics.jsonl` and to TensorBoard files in `tensorboard/`.

    What an earlier, killed process wrote after the step `keep_until` is dropped, a torn last line
    included, so every step is there once. Only one host should have `enabled=True`; elsewhere all
    calls do nothing.

    Every method raises OSError, with the name of the file, when the disk does not take it, be it
    for TensorBoard alone: such a disk would not take the next checkpoint either.
    """

    def __init__(
        self, workdir: str | os.PathLike[str], enabled: bool = True, keep_until: int = -1
    ) -> None:
        self._enabled = enabled
        if not enabled:
            return
        from cap_pretrain import tensorboard  # not above: a second where torch is installed

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= keep_until]
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = files.Appended(path)
        self._board = tensorboard.EventFile(workdir / "tensorboard", keep_until + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line. Values are numbers or arrays of one; NaN and infinity become null."""
        if not self._enabled:
            return
        values = {tag: float(value) for tag, value in metrics.items()}
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        line = json.dumps({"step": int(step)} | finite, allow_nan=False) + "\n"
        self._lines.write(line.encode())
        self._board.scalars(int(step), values)

    def text(self, step: int, tag: str, text: str) -> None:
        """Shows `text`, read as Markdown, in TensorBoard."""
        if self._enabled:
            self._board.text(int(step), tag, text)

    def images(self, step: int, tag: str, images: np.ndarray, captions: Sequence[str]) -> None:
        """Shows images uint8 [N, H, W, 3] as one grid and their N captions as a numbered list."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images but {len(captions)} captions for {tag!r}")
        if self._enabled:
            self._board.images(int(step), tag, np.asarray(images))
            self.text(step, tag, "\n".join(f"{i}. {c}" for i, c in enumerate(captions, 1)))

    def close(self) -> None:
        if self._enabled:
            self._lines.close()
            self._board.close()


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a workdir's metrics.jsonl, but any torn by a kill or a full disk."""
    path = Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and "step" in value:
                lines.append(value)
    return lines


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


class Progress:
    """Console progress: a bar redrawn in place on a terminal, one line a report in a log file."""

    def __init__(
        self, total_steps: int, *, mfu_label: str = "MFU", stream: TextIO | None = None
    ) -> None:
        self._total_steps, self._mfu_label = total_steps, mfu_label
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._step, self._figures = 0, []
        self._bar_shown, self._drawn_at = False, -math.inf

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Moves to `step`; `metrics` (`train/loss` and `time/...`) are shown until the next ones.

        Without metrics it only moves the bar, ten times a second at most: call it each step.
        """
        self._step = step
        if metrics is not None:
            self._figures = self._describe(metrics)
            if not self._terminal:
                self._print("  ".join([f"step {step}/{self._total_steps}", *self._figures]) + "\n")
        if self._terminal and (metrics is not None or time.monotonic() - self._drawn_at > 0.1):
            self._draw()

    def say(self, text: str) -> None:
        """Prints lines of text, above the bar if there is one."""
        self._print(f"{_ERASE if self._bar_shown else ''}{text}\n")
        if self._bar_shown:
            self._draw()

    def close(self) -> None:
        """Leaves the bar as it is and moves on to the next line."""
        if self._bar_shown:
            self._draw()
            self._print("\n")
            self._bar_shown = False

    def _draw(self) -> None:
        width = shutil.get_terminal_size().columns - 1  # some terminals wrap after a full line
        share = min(self._step / max(self._total_steps, 1), 1.0)
        # What does not fit beside a bar of ten cells is left out, whole figures at a time.
        text = f"{self._step}/{self._total_steps}"
        for figure in self._figures:
            if len(f"100% [] {text}  {figure}") + 10 > width:
                break
            text += f"  {figure}"
        cells = min(max(width - len(f"100% [] {text}"), 10), 40)
        full = int(share * cells)
        line = f"{share:4.0%} [{'#' * full}{'.' * (cells - full)}] {text}"
        self._print(_ERASE + line[:width])
        self._bar_shown, self._drawn_at = True, time.monotonic()

    def _describe(self, metrics: Mapping[str, float]) -> list[str]:
        forms = {  # the most wanted first, as a narrow terminal has no room for the last
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


_ERASE = "\r\x1b[K"  # to the first column, and clear the line


def format_duration(seconds: float) -> str:
    """65 -> "1:05", 3665 -> "1:01:05", 100000 -> "1d 3:46:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    return f"{f'{days}d ' if days else ''}{hour}:{minute:02}:{second:02}"


def parameter_table(params: Mapping[str, Any]) -> str:
    """Name, shape, dtype and size of each leaf of nested dicts of arrays or ShapeDtypeStructs."""
    return parameter_overview.get_parameter_overview(params, include_stats=False)


def format_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Columns under `headers`, the first to the left, the others to the right.

    Whole numbers get thousands separators, other numbers four digits.
    """

    def cell(value: Any) -> str:
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            return f"{value:,}" if isinstance(value, numbers.Integral) else f"{value:.4g}"
        return str(value)

    lines = [list(headers), *([cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for first, *rest in lines
    )
