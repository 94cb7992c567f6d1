"""Which examples did not decode, so that neighbours stood in for them: a list in the workdir."""

import bisect
import contextlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import files
from cap_pretrain.data import images, pipeline
from cap_pretrain.data.prefetch import Batch
from cap_pretrain.data.sources.base import Source

LIMIT = 10_000
"""Lines of the list; who has that many needs another dataset, not a longer list."""


class BrokenList:
    """Appends to `broken.jsonl` a line for each example that does not decode, as it first comes.

    A batch says which positions are broken, whoever prepared it. Their names and reasons are found
    by reading them again, here. Every host lists its own slices, others than the first in
    `broken.HOST.jsonl`. A line is {"step", "dataset", "index", "id", "reason"}.

    Args:
        data: the section of the config.
        sources: what the batches are drawn from.
        workdir: where the list is, and goes on.
        host: whose it is.
    """

    def __init__(self, data: ConfigDict, sources: Sequence[Source], workdir: Path, host: int = 0):
        self._size, self._crop, self._sources = data.image_size, data.crop, sources
        self._bounds = [0, *itertools.accumulate(map(len, sources))]
        self._path = workdir / (f"broken.{host}.jsonl" if host else "broken.jsonl")
        self._known = {(line["dataset"], line["index"]) for line in _lines(self._path)}

    def see(self, step: int, batch: Batch) -> None:
        """Lists what is broken in this host's slice of a batch, unless it is listed or it is full.

        Raises:
            OSError: the disk does not take it.
            UserError: a file of the dataset cannot be read any more.
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
            pipeline.square(image, self._size, self._crop, np.random.default_rng(0))
        except images.ImageError as error:
            return str(error)
        return "it decodes now"

    def _append(self, line: str) -> None:
        file = files.Appended(self._path)
        file.write(line.encode())
        file.close()


def _lines(path: Path) -> list[dict]:
    """The lines of a list, which is mended where a kill tore its last one."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    files.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines
