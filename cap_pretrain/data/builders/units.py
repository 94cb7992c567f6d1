"""Units of a build: work that is planned in advance, so that who does it, and when, has no effect.

A unit is a file with a row for each candidate, kept or dropped: a line of JSON, followed by the
image's bytes if the candidate is kept. A unit gets its final name only when it is complete, so a
build that was killed resumes with the units that are missing.
"""

import dataclasses
import functools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from cap_pretrain import files
from cap_pretrain.data.builders.candidates import Candidate

FOLDER = "units"  # in the work folder of a build
_LEAST = 1000  # candidates in a unit, if there are that many
_MOST = 64  # units in a part: making a unit means skipping all candidates before it
_PLAN = "plan.json"

Row = dict[str, Any]


class UnfinishedError(Exception):
    """The build stopped and resumes if it is run again; the message says why it stopped."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Candidates that are read sequentially, always in the same order."""

    read: Callable[[], Iterable[Candidate]]
    # None if candidates cannot be skipped without reading their images: the part is one unit.
    count: Callable[[], int] | None = None
    source: Path | None = None  # the file that holds the candidates, if there is one


@dataclasses.dataclass(frozen=True)
class Unit:
    """A range of candidates in a part of a split."""

    split: str
    number: int  # index of the unit in the split
    part: int  # index of the part in the split
    start: int  # index of the first candidate in the part
    stop: int | None  # index after the last candidate; None: all that remain

    def path(self, folder: Path) -> Path:
        """Return the unit's file in `folder`."""
        return folder / f"{self.split}-{self.number:06}.unit"


def cut(parts: Mapping[str, Sequence[Part]]) -> list[Unit]:
    """Divide the parts of all splits into units; the same input files give the same units."""
    units = []
    for split, own in parts.items():
        ranges = ((p, *limits) for p, part in enumerate(own) for limits in _ranges(part))
        units += [Unit(split, number, *limits) for number, limits in enumerate(ranges)]
    return units


def _ranges(part: Part) -> list[tuple[int, int | None]]:
    """Return (start, stop) of each unit in a part."""
    if part.count is None:
        return [(0, None)]
    count = part.count()
    size = max(_LEAST, -(-count // _MOST))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def resume(folder: Path, parts: Mapping[str, Sequence[Part]], settings: Any) -> list[Unit]:
    """Return the units of a build, and keep the finished ones in `folder` that fit the plan.

    Units that were made with other `settings` (JSON, `settings_of`), or from files that have
    changed since, are removed. `parts` are by split.
    """
    units = cut(parts)
    sources = [[_stamp(part.source) for part in own if part.source] for own in parts.values()]
    plan = json.dumps([settings, sources, [dataclasses.astuple(unit) for unit in units]])
    kept = folder / _PLAN
    if not kept.exists() or kept.read_text(encoding="utf-8") != plan:
        shutil.rmtree(folder, ignore_errors=True)
        files.write_text(kept, plan)
    for left_over in folder.glob("*.tmp"):
        left_over.unlink()
    return units


def settings_of(arguments: Mapping[str, Any]) -> Any:
    """Return what a build depends on, as JSON: its options, and the state of files they name."""
    texts = {name: _texts(value) for name, value in arguments.items()}
    named = {part for own in texts.values() for text in own for part in (text, _path_in(text))}
    # os.path.exists, unlike Path.exists, is False for "" and for names that are too long.
    paths = [name for name in sorted(named) if os.path.exists(name)]  # noqa: PTH110 (see above)
    return [texts, {name: _stamp(Path(name)) for name in paths}]


def _texts(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]


def _path_in(text: str) -> str:
    """Return the path in SPLIT=PATH, "" if the text is not of this form."""
    return text.partition("=")[2]


def _stamp(path: Path) -> tuple[str, int, int]:
    """Return path, size and modification time, which change if the file does."""
    try:
        status = path.stat()
    except OSError:  # a link to nothing, which is counted when it is read
        return str(path), -1, -1
    return str(path), status.st_size, status.st_mtime_ns


class RowMaker(Protocol):
    """What units need of a dataset builder."""

    def rows(self, unit: Unit, threads: int) -> Iterator[tuple[Row, bytes]]:
        """Yield the row of each candidate of a unit, and the image's bytes if it is kept."""
        ...


def make(builder: RowMaker, unit: Unit, folder: Path, threads: int) -> None:
    """Write a unit to its file in `folder`."""
    final = unit.path(folder)
    # The name is unique: another process, perhaps on another machine, may be making this unit, too.
    temporary = final.with_name(f"{final.name}.{uuid.uuid4().hex}.tmp")
    with files.naming(temporary), temporary.open("wb") as file:
        for row, data in builder.rows(unit, threads):
            line = json.dumps({**row, "bytes": len(data)} if data else row)
            file.write(line.encode() + b"\n" + data)
    temporary.replace(final)


def finished(folder: Path, split: str) -> list[Path]:
    """Return the files of a split's units in order; call it when all are made."""
    own = re.compile(re.escape(split) + r"-\d+\.unit")  # not those of "val-unseen" for "val"
    return sorted(path for path in folder.iterdir() if own.fullmatch(path.name))


def read_rows(path: Path, with_data: bool = False) -> Iterator[tuple[Row, bytes]]:
    """Yield the rows of a unit, with the images that were kept if `with_data`, else with b""."""
    with path.open("rb") as file:
        for line in file:
            row = json.loads(line)
            size = row.get("bytes", 0)
            if with_data:
                yield row, file.read(size)
            else:
                file.seek(size, os.SEEK_CUR)
                yield row, b""


def make_all(
    builder: RowMaker,
    make_builder: Callable[[], RowMaker],
    units: Sequence[Unit],
    folder: Path,
    workers: int,
) -> None:
    """Make the units that are missing, in this process if `workers` is 1, else in that many.

    Each worker process calls `make_builder` once, which must be picklable; this process uses
    `builder`. Raises UserError if the builder finds invalid input, UnfinishedError if a worker
    process died.
    """
    threads = max(1, (os.cpu_count() or 1) // workers)
    left = [unit for unit in units if not unit.path(folder).exists()]
    # disable=None: no bar where there is no terminal
    with tqdm(total=len(units), initial=len(units) - len(left), unit="unit", disable=None) as bar:
        if workers == 1 or not left:
            for unit in left:
                make(builder, unit, folder, threads)
                bar.update()
        else:
            for _ in _in_processes(make_builder, left, folder, workers, threads):
                bar.update()


def _in_processes(
    make_builder: Callable[[], RowMaker],
    units: Sequence[Unit],
    folder: Path,
    workers: int,
    threads: int,
) -> Iterator[None]:
    """Make units in worker processes; yields None after each."""
    # Not forked: a fork would copy the locks held by other threads, but not the threads.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = make_builder, folder, threads, theirs
    pool = ProcessPoolExecutor(min(workers, len(units)), context, _start, arguments)
    try:
        yield from (f.result() for f in as_completed([pool.submit(_work, unit) for unit in units]))
        pool.shutdown()
    except BrokenProcessPool as error:
        raise UnfinishedError(
            "a worker process has died, perhaps for lack of memory; run the same command again to "
            "resume, with fewer --workers."
        ) from error
    finally:
        ours.close()  # makes workers that are still running exit
        pool.shutdown(cancel_futures=True)


_make: Callable[[Unit], None]
"""In a worker process, the function that makes a unit; set by `_start`."""


def _work(unit: Unit) -> None:
    _make(unit)


def _start(
    make_builder: Callable[[], RowMaker],
    folder: Path,
    threads: int,
    parent: multiprocessing.connection.Connection,
) -> None:
    """Initialize a worker process, which exits when the parent exits or closes the pipe."""
    global _make
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C

    def leave_with_parent() -> None:
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _make = functools.partial(make, make_builder(), folder=folder, threads=threads)
