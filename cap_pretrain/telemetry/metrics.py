"""Writing and reading the metrics of a run: `metrics.jsonl`, TensorBoard files and trackers."""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cap_pretrain import files, untrusted
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry.trackers import guard
from cap_pretrain.telemetry.trackers.guard import Guarded


class MetricsWriter:
    """Appends metrics to `metrics.jsonl` and to TensorBoard files in `tensorboard/`.

    Methods raise OSError, with the name of the file, if they cannot write; a disk that is full for
    TensorBoard could not hold the next checkpoint either. Without `enabled`, for all hosts but one,
    they do nothing. Steps after `keep_until`, from an earlier process that was killed, are dropped,
    as is a truncated last line, so that every step appears once. `trackers` receive the same, and
    never raise.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        enabled: bool = True,
        keep_until: int = -1,
        trackers: Sequence[Guarded] = (),
    ) -> None:
        self._enabled, self._trackers = enabled, trackers
        if not enabled:
            return
        from cap_pretrain.telemetry import tensorboard

        workdir = files.place(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= keep_until]
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._lines = files.Appended(path)
        self._board = tensorboard.EventFile(workdir / "tensorboard", keep_until + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append scalars by name ("train/loss"); NaN and infinity become null in metrics.jsonl."""
        if not self._enabled:
            return
        values = {tag: float(value) for tag, value in metrics.items()}
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        line = json.dumps({"step": int(step)} | finite, allow_nan=False) + "\n"
        self._lines.write(line.encode())
        self._board.scalars(int(step), values)
        for tracker in self._trackers:
            tracker.scalars(int(step), values)

    def text(self, step: int, tag: str, text: str) -> None:
        """Add a Markdown text to TensorBoard and to the trackers."""
        if self._enabled:
            self._board.text(int(step), tag, text)
            for tracker in self._trackers:
                tracker.text(int(step), tag, text)

    def images(self, step: int, tag: str, images: np.ndarray, captions: Sequence[str]) -> None:
        """Add images (uint8 [N, H, W, 3], one grid in TensorBoard) and their N captions."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images but {len(captions)} captions for {tag!r}")
        if self._enabled:
            listed = "\n".join(f"{i}. {c}" for i, c in enumerate(captions, 1))
            self._board.images(int(step), tag, np.asarray(images))
            self._board.text(int(step), tag, listed)
            for tracker in self._trackers:
                tracker.images(int(step), tag, images, captions)

    def flush(self) -> None:
        """Return when others can read what was written; a bucket gets it from time to time."""
        if self._enabled:
            self._lines.flush()
            self._board.flush()

    def close(self, failed: bool = False) -> None:
        """Close the files and the trackers, as `failed` if an error or a signal ends the run."""
        if self._enabled:
            with contextlib.ExitStack() as stack:  # one that fails leaves none of the others open
                stack.callback(guard.close, self._trackers, failed)
                stack.callback(self._board.close)
                stack.callback(self._lines.close)


def read_metrics(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the lines of a workdir's metrics.jsonl; [] if it is missing.

    Truncated lines, and others that `MetricsWriter` does not write, are left out.
    """
    path = files.place(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for text in untrusted.read_bounded(path).decode("utf-8", "replace").splitlines():
        with contextlib.suppress(UserError):
            line = untrusted.parse_json(text, path)
            untrusted.bounded(untrusted.entry(line, "step", int, path), "step", 0, 2**53, path)
            for name, value in line.items():
                untrusted.checked(value, name, (int, float, type(None)), path)
            lines.append(line)
    return lines
