"""A build in units: what each is made of is settled before, who makes it and when does not matter.

A unit is a file of rows, one for each candidate, kept or not: a line of JSON, and the image's bytes
if it is kept. It has its name only once it is whole, so that a build that was killed goes on with
the units that are missing.
"""

import dataclasses
import functools
import glob
import json
import multiprocessing
import multiprocessing.connection
import os
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

FOLDER = "units"
"""Where the units of a build are, in the folder it works in."""

_LEAST = 1000  # candidates of a unit, where there are as many
_MOST = 64  # units of a part: who makes one passes over all that is before it
_PLAN = "plan.json"

Row = dict[str, Any]


class Unfinished(Exception):
    """A build has stopped that goes on where it was if it is run again; says why."""


@dataclasses.dataclass(frozen=True)
class Part:
    """Candidates that are read from the first to the last.

    Attributes:
        read: yields them, always in the same order.
        count: returns how many they are, if they can be passed over without reading the images;
            None: they cannot.
        source: the file they are in, if it is one.
    """

    read: Callable[[], Iterable[Candidate]]
    count: Callable[[], int] | None = None
    source: Path | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
    """Candidates `start` to `stop` (None: the last) of a part of a split; `number` is its place."""

    split: str
    number: int
    part: int
    start: int
    stop: int | None

    def path(self, folder: Path) -> Path:
        return folder / f"{self.split}-{self.number:06}.unit"


def cut(parts: Mapping[str, Sequence[Part]]) -> list[Unit]:
    """Cuts the parts of all splits into units, the same for the same files."""
    units = []
    for split, own in parts.items():
        ranges = ((p, *limits) for p, part in enumerate(own) for limits in _ranges(part))
        units += [Unit(split, number, *limits) for number, limits in enumerate(ranges)]
    return units


def _ranges(part: Part) -> list[tuple[int, int | None]]:
    if part.count is None:
        return [(0, None)]
    count = part.count()
    size = max(_LEAST, -(-count // _MOST))
    return [(start, min(start + size, count)) for start in range(0, count, size)]


def resume(folder: Path, parts: Mapping[str, Sequence[Part]], settings: Any) -> list[Unit]:
    """Returns all units of a build, those that are finished included.

    Finished units of a build with other `settings`, or of files that have changed, are removed.
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
    """What a build depends on, as JSON: its arguments, and the state of files that they name."""
    texts = {name: _texts(value) for name, value in arguments.items()}
    named = {part for own in texts.values() for text in own for part in (text, _path_in(text))}
    return [texts, {name: _stamp(Path(name)) for name in sorted(named) if os.path.exists(name)}]


def _texts(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else [str(value)]


def _path_in(text: str) -> str:
    """The path of SPLIT=PATH."""
    return text.partition("=")[2]


def _stamp(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns


class RowMaker(Protocol):
    """What makes the rows of a unit: a dataset builder."""

    def rows(self, unit: Unit, threads: int) -> Iterator[tuple[Row, bytes]]:
        """Yields the row of each candidate of a unit, with the image's bytes if it is kept."""
        ...


def make(builder: RowMaker, unit: Unit, folder: Path, threads: int) -> None:
    """Makes a unit."""
    final = unit.path(folder)
    # Another process, on another machine perhaps, may be at it, too.
    fresh = final.with_name(f"{final.name}.{uuid.uuid4().hex}.tmp")
    with files.naming(fresh), fresh.open("wb") as file:
        for row, data in builder.rows(unit, threads):
            line = json.dumps({**row, "bytes": len(data)} if data else row)
            file.write(line.encode() + b"\n" + data)
    os.replace(fresh, final)


def finished(folder: Path, split: str) -> list[Path]:
    """The units of a split in their order, when all are made."""
    return sorted(folder.glob(f"{glob.escape(split)}-*.unit"))


def read_rows(path: Path, with_data: bool = False) -> Iterator[tuple[Row, bytes]]:
    """Yields the rows of a unit, and the images that were kept, or b""."""
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
    """Makes the units that are missing, in as many processes; 1: in this one.

    Args:
        builder: what makes them in this process.
        make_builder: called in each of the others to have one there.
        units: all units of the build.
        folder: where they are.
        workers: number of processes.

    Raises:
        UserError: as the builder.
        Unfinished: a process has died.
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
    # Not forked: a fork has of the threads of this process only the locks they held.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = make_builder, folder, threads, theirs
    pool = ProcessPoolExecutor(min(workers, len(units)), context, _start, arguments)
    try:
        yield from (f.result() for f in as_completed([pool.submit(_work, unit) for unit in units]))
        pool.shutdown()
    except BrokenProcessPool as error:
        raise Unfinished(
            "a worker process has died, perhaps for lack of memory; run it again to go on, with "
            "fewer --workers."
        ) from error
    finally:
        ours.close()  # which ends those that still work
        pool.shutdown(cancel_futures=True)


_make: Callable[[Unit], None]
"""In a worker process: makes a unit."""


def _work(unit: Unit) -> None:
    _make(unit)


def _start(
    make_builder: Callable[[], RowMaker],
    folder: Path,
    threads: int,
    parent: multiprocessing.connection.Connection,
) -> None:
    """Makes a process one that works, until its parent ends or closes its end of the pipe."""
    global _make
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to answer

    def leave_with_parent() -> None:
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()
    _make = functools.partial(make, make_builder(), folder=folder, threads=threads)
