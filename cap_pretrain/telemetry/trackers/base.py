"""The interface of trackers, and what they are given of a run."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cap_pretrain import files

PROJECT = (
    "cap_pretrain"  # where runs are collected unless the tracker's own variables say otherwise
)

USER_INFO = re.compile(r"(?<=://)[^/@\s]*@")  # in a URL: user:password@


@dataclasses.dataclass(frozen=True)
class Run:
    """What a tracker is given of a run.

    Attributes:
        workdir: Folder of the run; its name is the name of the run.
        config: Complete config, nested, JSON-like.
        lines: Lines of metrics.jsonl that an earlier start has left, complete.
        keep_until: Last step of those lines that still counts; later steps are computed again.
        trains: Whether it trains. Else every figure is of step 0, and another one is a new one.
    """

    workdir: Path
    config: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]] = ()
    keep_until: int = -1
    trains: bool = True

    @property
    def name(self) -> str:
        """Name of the run for people."""
        return self.workdir.absolute().name

    @property
    def folder(self) -> Path:
        """Local folder for the tracker's own files: the workdir, unless it is in a bucket."""
        folder = files.local_folder(self.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def fields(self) -> dict[str, Any]:
        """Return the fields of the config by dotted name, without passwords in URLs."""
        return dict(_flat(self.config, ""))


class Tracker(Protocol):
    """An experiment tracker.

    Attributes:
        identity: What `Tracker(run, identity)` needs to continue this run. If it cannot be
            continued, a new run is opened, and the identity differs.
    """

    identity: str

    def __init__(self, run: Run, identity: str | None) -> None: ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to the curve of each name; values may be NaN or infinite."""

    def text(self, step: int, tag: str, text: str) -> None:
        """Add a Markdown text."""

    def images(self, step: int, tag: str, images: np.ndarray, captions: Sequence[str]) -> None:
        """Add images, uint8 [N, H, W, 3], each with its caption."""

    def close(self, failed: bool) -> None:
        """Send what is left and end the run, as `failed` if an error or a signal ended it."""


def _flat(section: Mapping[str, Any], prefix: str) -> Any:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", USER_INFO.sub("", value) if isinstance(value, str) else value
