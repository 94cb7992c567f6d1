"""The list of examples that did not decode and were replaced by neighbors, `broken.jsonl`."""

import bisect
import contextlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cap_pretrain import files, untrusted
from cap_pretrain.data import images
from cap_pretrain.data.prefetch import Batch
from cap_pretrain.data.sources.base import Source
from cap_pretrain.data.views import View
from cap_pretrain.errors import UserError

LIMIT = 10_000
"""Maximum number of lines. A dataset with more broken examples needs repair, not a longer list."""


class BrokenList:
    """Appends a line to `broken.jsonl` when an example that does not decode occurs first.

    A batch marks broken positions; the ids and reasons come from reading these examples again.
    Every host lists its own slices, hosts other than the first in `broken.HOST.jsonl`, and
    continues an existing list. A line is {"step", "dataset", "index", "id", "reason"}. `view` is
    what evaluation sees of an image, `sources` the datasets of the mixture in order, `host` the
    index of this process.
    """

    def __init__(self, view: View, sources: Sequence[Source], workdir: Path, host: int = 0):
        self._view, self._sources = view, sources
        self._bounds = [0, *itertools.accumulate(map(len, sources))]
        self._path = workdir / (f"broken.{host}.jsonl" if host else "broken.jsonl")
        self._known = {(line["dataset"], line["index"]) for line in _lines(self._path)}
        self._file: files.Appended | None = None

    def see(self, step: int, batch: Batch) -> None:
        """List the broken examples of this host's slice of a batch that are not listed yet.

        Raises OSError if writing fails, UserError if a file of the dataset can no longer be read.
        """
        for position in batch["index"][batch["broken"]].tolist():
            member = bisect.bisect_right(self._bounds, position) - 1
            source, index = self._sources[member], position - self._bounds[member]
            key = (str(source), index)
            if key in self._known or len(self._known) >= LIMIT:
                continue
            example = source[index]
            line = {
                **{"step": step, "dataset": key[0], "index": index, "id": example["id"]},
                "reason": self._reason(example["image"]),
            }
            self._append(json.dumps(line) + "\n")
            self._known.add(key)

    def _reason(self, image: bytes | np.ndarray) -> str:
        try:
            self._view(image)
        except images.ImageError as error:
            return str(error)
        return "it decodes now"

    def flush(self) -> None:
        """Return when others can read the list."""
        if self._file:
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def _append(self, line: str) -> None:
        self._file = self._file or files.Appended(self._path)
        self._file.write(line.encode())


def _lines(path: Path) -> list[dict]:
    """Return the lines of a list. A last line that is incomplete after a kill is removed."""
    if not path.exists():
        return []
    lines = []
    for text in untrusted.read_bounded(path).decode("utf-8", "replace").splitlines():
        with contextlib.suppress(UserError):
            line = untrusted.parse_json(text, path)
            untrusted.entry(line, "dataset", str, path)
            untrusted.entry(line, "index", int, path)
            lines.append(line)
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines
