"""Indexes of tars: where the files of each example lie, kept beside the tars.

Tars have no table of contents, so one pass finds the headers. The result of each tar is one
file, so that a pass that was stopped resumes, and several hosts that share the folder divide the
work. An index names size and stamps of its tar, so that a changed tar is indexed again.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cap_pretrain.data import tar_examples
from cap_pretrain.data.sources import storage, unchanged
from cap_pretrain.data.sources.listing import File, Listing
from cap_pretrain.data.sources.passes import write_whole
from cap_pretrain.data.sources.storage import Remote, retried, why
from cap_pretrain.data.tars import CutOffError, Member, find_members
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry import console
from cap_pretrain.untrusted import open_regular

FOLDER = ".cap_index"
"""The folder beside the tars that holds their indexes."""

ENTRY = np.dtype(
    [
        ("image", "<i8"),  # offset of the image's content
        ("image_size", "<u4"),
        ("text", "<i4"),  # offset of the .txt, in blocks of 512 bytes from the image's
        ("text_size", "<u4"),  # 0: none
        ("json", "<i4"),
        ("json_size", "<u4"),
        ("label", "<i4"),
        ("label_size", "<u4"),
        ("named", "?"),  # whether the header before the image holds its whole name
    ]
)
"""An example in an index: where its files lie."""

_FORMAT, _VERSION = "cap_pretrain index of a tar", 1
_BLOCK = 512  # bytes; contents begin at multiples (POSIX.1-1988, ustar)
_MOST_HEADER = 2**16  # bytes of an index before its entries
_THREADS = 16  # tars that are indexed at a time by threads
_MANY = 2**32  # bytes of local tars from which processes index them: Python's threads share a core
_JUMP = 2**20  # bytes; after a longer jump in a remote tar, little is read ahead
_LITTLE = 2**16  # bytes

_FILES = (("text", ".txt"), ("json", ".json"), ("label", tar_examples.LABEL))


@dataclasses.dataclass(frozen=True)
class Index:
    """The examples of a tar, in its order."""

    entries: np.ndarray  # [n] of ENTRY
    lost: dict[str, int]  # examples that are left out, by reason
    cut: str  # where and why the tar ends early; "": it does not


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a file lies in a tar; its length is the number of its bytes."""

    start: int
    size: int
    whole_name: bool

    def __len__(self) -> int:
        return self.size


def index_tar(file: BinaryIO, size: int) -> Index:
    """Find the examples of an uncompressed tar of `size` bytes; raises what reading it raises."""
    found: list[tuple] = []
    lost: dict[str, int] = {}
    key, cut = "its start", ""

    def places() -> Iterable[tuple[str, _Place | None]]:
        for member in find_members(file, size):
            yield member.name, _needed(member)

    try:
        for key, files in tar_examples.examples(places()):  # noqa: B007 (used afterwards)
            entry = _entry(files)
            if isinstance(entry, str):
                lost[entry] = lost.get(entry, 0) + 1
            else:
                found.append(entry)
    except CutOffError as error:
        cut = f"after {key[-100:]!r} ({error})"
    return Index(np.array(found, ENTRY), lost, cut)


def _needed(member: Member) -> _Place | None:
    suffix = tar_examples.split(member.name)[1]
    most = tar_examples.MAX_TEXT if suffix == tar_examples.LABEL else tar_examples.limit(suffix)
    if not (member.readable and member.size <= most):
        return None
    # Longer names stand in headers of their own, before this one (tarfile: LENGTH_NAME is 100).
    plain = len(member.name.encode("utf-8", "surrogateescape")) < 100
    return _Place(member.start, member.size, plain)


def _entry(files: tar_examples.Found[_Place]) -> tuple | str:
    """Return an example as of ENTRY, or why it is left out."""
    images = tar_examples.images(files)
    if not images:
        return "without image"
    image = files[images[0]]
    if image is None:
        return "image too large"
    entry: list[int | bool] = [image.start, image.size]
    for _, suffix in _FILES:
        place = files.get(suffix)
        if suffix in files and place is None:
            return "member too large"
        apart = (place.start - image.start) // _BLOCK if place else 0
        if abs(apart) >= 2**31:
            return "files far apart"
        entry += [apart, place.size] if place else [0, 0]
    return (*entry, image.whole_name)


def packed(index: Index, tar: File) -> bytes:
    """Return an index as the bytes of its file."""
    about = {
        **{"format": _FORMAT, "version": _VERSION, "size": tar.size, "stamps": tar.stamps},
        **{"examples": len(index.entries), "lost": index.lost, "cut": index.cut},
    }
    line = json.dumps(about).encode()
    return line.ljust(-(-(len(line) + 1) // 64) * 64 - 1) + b"\n" + index.entries.tobytes()


def unpacked(data: bytes, tar: File) -> Index | None:
    """Return the index in a file, or None unless it is a whole one of this very tar.

    Its offsets are not trusted: `wds` checks them against the size of the tar when it reads.
    """
    line, newline, rest = data.partition(b"\n")
    try:
        about = json.loads(line) if newline and len(line) < _MOST_HEADER else {}
        if (about["format"], about["version"]) != (_FORMAT, _VERSION):
            return None
        if (about["size"], tuple(about["stamps"])) != (tar.size, tar.stamps):
            return None
        lost = {str(k)[:100]: int(n) for k, n in about["lost"].items()}
        entries = np.frombuffer(rest, ENTRY)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    if len(entries) != about["examples"] or len(lost) > 20:
        return None
    return Index(entries, lost, str(about["cut"])[:500])


class Indexes:
    """The indexes of the tars of a listing: found, or made in one pass."""

    def __init__(self, listing: Listing, cache: str, where: str):
        self._listing, self._where = listing, where
        digest = hashlib.sha256(str(listing.root).encode()).hexdigest()[:16]
        self._cache = storage.cache_folder(cache) / f"tars-{digest}"
        self._own = True  # whether indexes can be written beside the tars, as far as is known

    def load(self) -> list[Index]:
        """Return the index of every tar, making those that are missing.

        Raises UserError if a tar cannot be read, is compressed, or no index can be kept.
        """
        count = len(self._listing.files)
        with ThreadPoolExecutor(_THREADS) as threads:
            indexes = enumerate(threads.map(self._find, range(count)))
            found = {number: index for number, index in indexes if index}
        missing = [number for number in range(count) if number not in found]
        if missing:
            with console.doing(self._announced(missing)):
                for done, (number, index) in enumerate(self._made(missing), 1):
                    found[number] = index
                    console.advance(done, len(missing))
        made = [found[number] for number in range(count)]
        if notes := _losses(made, [file.name for file in self._listing.files]):
            console.say(f"{self._where}: {notes}")
        return made

    def _announced(self, missing: Sequence[int]) -> str:
        size = sum(self._listing.files[number].size for number in missing)
        tars = f"{len(missing):,} tar{'s' if len(missing) > 1 else ''} ({size / 1e9:,.1f} GB)"
        remote = isinstance(self._listing.root, Remote)
        how = "their headers are read once"
        if remote:
            requests = -(-size // storage.CHUNK) + len(missing)
            how = f"they are streamed once, in about {requests:,} requests by all hosts together"
        return f"Indexing {tars} of {self._where}: {how}; the index is kept in {self._kept_in()}"

    def _kept_in(self) -> str:
        root = self._listing.root
        if isinstance(root, Path) and os.access(root, os.W_OK):
            return str(root / FOLDER)
        beside = f"{root / FOLDER} if that can be written, and in " * isinstance(root, Remote)
        return f"{beside}{self._cache}"

    def _made(self, missing: Sequence[int]) -> Iterable[tuple[int, Index]]:
        """Yield (number, index) of tars as they are done, in an order that differs by host."""
        order = list(missing)
        random.Random().shuffle(order)
        with self._pool(order) as pool:
            futures = [pool.submit(self._find_or_make, number) for number in order]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _pool(self, missing: Sequence[int]) -> Executor:
        size = sum(self._listing.files[number].size for number in missing)
        cores = min(len(missing), os.cpu_count() or 1)
        if isinstance(self._listing.root, Remote) or size < _MANY or cores < 2:
            return ThreadPoolExecutor(_THREADS)
        return ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn"))

    def _find_or_make(self, number: int) -> tuple[int, Index]:
        """Return the index of a tar, which another host may have made meanwhile."""
        tar = self._listing.files[number]
        if (index := self._find(number)) is None:
            index = self._index(number)
            self._keep(number, packed(index, tar))
        return number, index

    def _index(self, number: int) -> Index:
        path, tar = self._listing.path(number), self._listing.files[number]
        try:
            with _opened(path, tar) as file:
                start = file.read(2)
                file.seek(0)
                if start == b"\x1f\x8b":
                    raise UserError(
                        f"{path}: is compressed, so its examples cannot be read in any order; "
                        "gunzip it, or build a dataset from it with cap build webdataset."
                    )
                return index_tar(file, tar.size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({why(error)}).") from error

    def _beside(self, number: int) -> Path | Remote:
        folder, _, base = self._listing.files[number].name.rpartition("/")
        root = self._listing.root
        return (root / folder if folder else root) / FOLDER / f"{base}.index"

    def _copy(self, number: int) -> Path:
        """Return where the index of a tar is kept that cannot be kept beside it."""
        return self._cache / f"{self._listing.files[number].name}.index"

    def _find(self, number: int) -> Index | None:
        tar = self._listing.files[number]
        for path in (self._copy(number), self._beside(number)):
            with contextlib.suppress(OSError, UserError):  # there is none, or it cannot be read
                if index := unpacked(_content(path), tar):
                    if isinstance(path, Remote):
                        write_whole(self._copy(number), packed(index, tar))
                    return index
        return None

    def _keep(self, number: int, data: bytes) -> None:
        beside, copy = self._beside(number), self._copy(number)
        try:
            if self._own and isinstance(beside, Remote):
                beside.call(lambda fs, path: fs.pipe_file(path, data))
            elif self._own and isinstance(beside, Path):
                write_whole(beside, data)
                return
        except (OSError, UserError):  # a folder of somebody else, or read only
            self._own = False
        try:
            write_whole(copy, data)
        except OSError as error:
            raise UserError(
                f"data.cache: cannot write to {copy.parent} ({why(error)}); make room or name "
                "another folder."
            ) from error


def _content(path: Path | Remote) -> bytes:
    if isinstance(path, Remote):
        return path.call(lambda fs, name: fs.cat_file(name))
    with retried(lambda: open_regular(path)) as file:
        return file.read()


def _losses(indexes: Sequence[Index], names: Sequence[str]) -> str:
    """Return what is left out of the tars, for the log; "" if nothing is."""
    lost: dict[str, int] = {}
    for index in indexes:
        for reason, count in index.lost.items():
            lost[reason] = lost.get(reason, 0) + count
    parts = [f"{count:,} examples left out ({reason})" for reason, count in sorted(lost.items())]
    cut = [f"{name} {index.cut}" for name, index in zip(names, indexes, strict=True) if index.cut]
    if cut:
        more = f" and {len(cut) - 1:,} more" if len(cut) > 1 else ""
        parts.append(f"{len(cut):,} of {len(names):,} tars end early, {cut[0]}{more}")
    return "; ".join(parts)


def _opened(path: Path | Remote, file: File) -> BinaryIO:
    """Open a tar for reading forward."""
    if isinstance(path, Path):
        return retried(lambda: open_regular(path))
    return io.BufferedReader(_Forward(path, file), 1)


class _Forward(io.RawIOBase):
    """A remote file that is read forward: in large requests, or after long jumps in small ones."""

    def __init__(self, remote: Remote, file: File):
        self._remote, self._file, self._size = remote, file, file.size
        self._at, self._start, self._data = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset if whence == 0 else (self._at if whence == 1 else self._size) + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = self._start + len(self._data)
        if not self._start <= self._at < end:
            jump = self._at - end if self._data else 0
            most = _LITTLE if jump > _JUMP or self._at < self._start else storage.CHUNK
            stop = min(self._at + most, self._size)
            if stop <= self._at:
                return 0
            data = unchanged.read_range(self._remote, self._at, stop, self._file.info)
            self._start, self._data = self._at, data
        place = self._at - self._start
        part = self._data[place : place + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)
