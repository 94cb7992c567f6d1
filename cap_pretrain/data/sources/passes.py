"""Passes over the examples of a dataset: over a sample in whole blocks, or over all of them.

What is stored remotely is read in whole blocks that are announced, so that they are fetched once,
in the background and by large requests. A pass over everything shows how far it is, and its answer
is kept beside the dataset's other files in the cache, so that the next start does not repeat it.
"""

import contextlib
import hashlib
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from cap_pretrain.data.sources.base import Source, block_bounds, read_ahead
from cap_pretrain.telemetry import console

SPOTS = 32
"""Places over which a sample of whole blocks is spread, so that it touches about as many files."""

_AHEAD = 32  # blocks that are announced in a pass over everything
BLOCK = 256
"""Most examples of a block, the default of data.block."""

Run = tuple[int, int]
"""First example, and that after the last."""


def sample(source: Source, limit: int, block: int = 0) -> Iterator[int]:
    """Yield the indices of at most `limit` examples that are spread over a source.

    With `block`, they are whole blocks of up to so many examples at SPOTS places, else each is as
    far from the next. All of a smaller source are yielded.
    """
    count = min(limit, len(source))
    if not block or count == len(source):
        return (i * len(source) // count for i in range(count))
    runs = sample_runs(block_bounds(source, block), count)
    read_ahead(source, runs)
    return itertools.chain.from_iterable(itertools.starmap(range, runs))


def sample_runs(bounds: np.ndarray, count: int) -> list[Run]:
    """Return runs of whole blocks at SPOTS places with `count` examples in all, the last run cut.

    `bounds` are those of `base.block_bounds`.
    """
    blocks, total = len(bounds) - 1, int(bounds[-1])
    spots = max(1, min(SPOTS, blocks, round(count / (total / blocks))))
    firsts = [spot * blocks // spots for spot in range(spots)]
    runs, left = [], count
    for spot, (first, end) in enumerate(itertools.pairwise([*firsts, blocks])):
        wanted = -(-left // (spots - spot))
        last = int(np.searchsorted(bounds, bounds[first] + wanted))  # the block that fills the run
        start, stop = int(bounds[first]), int(bounds[min(last, end)])
        stop = min(stop, start + left)
        if start < stop:
            runs.append((start, stop))
        left -= stop - start
    return runs


def whole(source: Source) -> Iterator[range]:
    """Yield the indices of all examples, a block at a time; shows the progress of an activity."""
    bounds = block_bounds(source, BLOCK).tolist()
    runs = list(itertools.pairwise(bounds))
    for number, run in enumerate(runs):
        if number % (_AHEAD // 2) == 0:
            read_ahead(source, runs[number : number + _AHEAD])
        yield range(*run)
        console.advance(run[1], bounds[-1])


def answers_folder(folder: Path, fields: Mapping[str, str] | None) -> Path:
    """Return the folder of `kept` answers in one that belongs to a content, by fields."""
    chosen = repr(sorted((fields or {}).items()))
    return folder / f"answers-{hashlib.sha256(chosen.encode()).hexdigest()[:16]}"


def kept(source: Source, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return `make()`, or what an earlier call for the same data and name has kept.

    Only of a source with `answers`, a folder that belongs to its very content, anything is kept.
    """
    folder: Path | None = getattr(source, "answers", None)
    if folder is None:
        return make()
    about = repr((str(source), len(source), name))
    path = folder / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    answer = make()
    file = io.BytesIO()
    np.save(file, answer, allow_pickle=False)
    with contextlib.suppress(OSError):  # it is made again next time
        write_whole(path, file.getvalue())
    return answer


def write_whole(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file, or its parts, atomically, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            os.fchmod(file.fileno(), 0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
