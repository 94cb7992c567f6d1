"""What a run writes for its report: facts of itself, and the page after evaluations."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging

import cap_pretrain
from cap_pretrain import files, reports
from cap_pretrain.errors import UserError
from cap_pretrain.reports import workdir

PERIOD = 30.0
"""Seconds at least between two pages, except for the last."""

SHARE = 0.01
"""Share of a run's time at most that pages take: a slow one waits so much longer."""


class Journal:
    """Writes report/facts.json and report.html in a workdir; a failure only warns.

    `enabled` is whether this process writes; `facts` are what is noted, as JSON, in addition to
    versions and starts.
    """

    def __init__(
        self,
        folder: Path,
        facts: Callable[[], dict[str, Any]],
        *,
        enabled: bool,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._folder, self._facts, self._enabled, self._clock = folder, facts, enabled, clock
        self._noted: dict[str, Any] = {}
        self._starts: list[dict[str, Any]] = []
        self._began, self._next = clock(), -float("inf")
        self._at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def write(self, step: int, *, last: bool = False) -> None:
        """Write both at `step` if it is time; the `last` time in any case."""
        if not self._enabled or (self._clock() < self._next and not last):
            return
        began = self._clock()
        try:
            self._note(step)
            page = reports.render(self._folder)
            files.write_text(self._folder / reports.FILE, page)
        except Exception as error:  # whatever it is, the run goes on
            logging.warning("%s was not written: %s", self._folder / reports.FILE, error)
        now = self._clock()
        self._next = now + max(PERIOD, (now - began) / SHARE)

    def _note(self, step: int) -> None:
        """Write facts.json, with the time of this start so far."""
        path = self._folder / workdir.FOLDER / workdir.FACTS
        if not self._noted:
            with contextlib.suppress(UserError):  # a damaged file is replaced
                earlier = files.read_json(path) if path.exists() else {}
                self._starts = workdir.entries(earlier, "starts")
            self._noted = self._facts() | {"versions": versions(), "commit": commit()}
        own = {
            **{"at": self._at, "step": step, "devices": jax.device_count()},
            "seconds": round(self._clock() - self._began, 1),
        }
        content = self._noted | {"starts": [*self._starts, own]}
        files.write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"cap_pretrain": cap_pretrain.__version__, "jax": jax.__version__, "python": python}


def commit() -> str:
    """Return the commit of the code if it is a checkout of git, with "+" if files differ; or ""."""
    root = Path(cap_pretrain.__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    command = [
        "git",
        "-C",
        str(root),
        "describe",
        "--always",
        "--abbrev=12",
        "--dirty=+",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if not done.returncode else ""
