"""Indexes of tars: where the files of each example lie, kept beside the tars.

Tars have no table of contents, so one pass finds the headers. The result of each tar is one
file, so that a pass that was stopped resumes, and several hosts that share the folder divide the
work. The indexes of a dataset are joined in a file on the local disk, which processes map. An index
names size and stamps of its tar, so that a changed tar is indexed again.
"""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import BinaryIO

import numpy as np

from cap_pretrain.data import tar_examples
from cap_pretrain.data.sources import storage
from cap_pretrain.data.sources.forward import opened
from cap_pretrain.data.sources.listing import File
from cap_pretrain.data.sources.passes import write_whole
from cap_pretrain.data.sources.storage import Remote, retried, why
from cap_pretrain.data.tars import CutOffError, Member, find_members
from cap_pretrain.distributed import cluster
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
# Files of a dataset: the indexes of all tars, one after the other, and what the log says of them.
_ENTRIES, _COUNTS = f"tars-{_VERSION}.entries", f"tars-{_VERSION}.json"
_BLOCK = 512  # bytes; contents begin at multiples (POSIX.1-1988, ustar)
_MOST_HEADER = 2**16  # bytes of an index before its entries
_THREADS = 16  # tars that are indexed at a time by threads
_MANY = 2**32  # bytes of local tars from which processes index them: Python's threads share a core

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


@dataclasses.dataclass(frozen=True)
class Joined:
    """The examples of all tars of a dataset, in the order of its files."""

    entries: np.ndarray  # [n] of ENTRY, mapped from a file
    counts: list[int]  # of each tar
    notes: str  # what is left out, for the log; "": nothing is


class Indexes:
    """The indexes of the tars below a folder: found, or made in one pass, and joined in a file."""

    def __init__(self, root: Path | Remote, cache: str, where: str):
        self._root, self._where = root, where
        digest = hashlib.sha256(str(root).encode()).hexdigest()[:16]
        self._cache = storage.cache_folder(cache) / f"tars-{digest}"
        # Whether indexes can be written beside the tars, as far as is known.
        self._own = isinstance(root, Path) or not root.url.startswith(("http:", "https:"))

    def load(self, tars: Sequence[File], folder: Path) -> Joined:
        """Return the joined indexes of tars, making those that are missing.

        They are mapped from a file in `folder`, which belongs to these very tars. Raises UserError
        if a tar cannot be read, is compressed, or no index can be kept.
        """
        joined = _mapped(folder)
        if joined is None:
            with ThreadPoolExecutor(_THREADS) as threads:
                found = list(threads.map(lambda tar: self._find(tar) is not None, tars))
            missing = [number for number, there in enumerate(found) if not there]
            if missing:
                self._make_all([tars[number] for number in _by_host(missing, len(tars))])
            joined = self._join(tars, folder)
        if joined.notes:
            console.say(f"{self._where}: {joined.notes}")
        return joined

    def _join(self, tars: Sequence[File], folder: Path) -> Joined:
        """Write the indexes one after the other to a file, or else to memory."""
        counts: list[int] = []
        left_out: list[Index] = []

        def parts() -> Iterator[bytes]:
            with ThreadPoolExecutor(_THREADS) as threads:
                for at in range(0, len(tars), _THREADS):
                    for index in threads.map(self._find_or_make, tars[at : at + _THREADS]):
                        counts.append(len(index.entries))
                        left_out.append(dataclasses.replace(index, entries=np.empty(0, ENTRY)))
                        yield index.entries.tobytes()

        with contextlib.suppress(OSError):
            write_whole(folder / _ENTRIES, parts())
            notes = _losses(left_out, [tar.name for tar in tars])
            about = {"counts": counts, "notes": notes}
            write_whole(folder / _COUNTS, json.dumps(about).encode())
            if joined := _mapped(folder):
                return joined
        counts, left_out = [], []
        entries = np.frombuffer(b"".join(parts()), ENTRY)
        return Joined(entries, counts, _losses(left_out, [tar.name for tar in tars]))

    def _announced(self, missing: Sequence[File]) -> str:
        size = sum(tar.size for tar in missing)
        tars = f"{len(missing):,} tar{'s' if len(missing) > 1 else ''} ({size / 1e9:,.1f} GB)"
        begin, beside = f"Indexing {tars} of {self._where}", self._root / FOLDER
        if isinstance(self._root, Remote):
            requests = -(-size // storage.CHUNK) + len(missing)
            begin += f": they are streamed once, in about {requests:,} requests"
            shared = f" and, for all hosts to share the work, in {beside} if that can be written"
            return f"{begin}; the index is kept in {self._cache}{shared * self._own}"
        kept = beside if os.access(self._root, os.W_OK) else self._cache
        return f"{begin}: their headers are read once; the index is kept in {kept}"

    def _make_all(self, missing: Sequence[File]) -> None:
        """Make the indexes of tars, in their order."""
        with console.doing(self._announced(missing)), self._pool(missing) as pool:
            futures = [pool.submit(self._make, tar) for tar in missing]
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    future.result()
                    console.advance(done, len(missing))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _pool(self, missing: Sequence[File]) -> Executor:
        size = sum(tar.size for tar in missing)
        cores = min(len(missing), os.cpu_count() or 1)
        if isinstance(self._root, Remote) or size < _MANY or cores < 2:
            return ThreadPoolExecutor(_THREADS)
        return ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn"))

    def _make(self, tar: File) -> None:
        """Keep the index of a tar; what a process pool calls, so its result is small."""
        self._find_or_make(tar)

    def _find_or_make(self, tar: File) -> Index:
        """Return the index of a tar, which another host may have made meanwhile."""
        if (index := self._find(tar)) is None:
            index = self._index(tar)
            self._keep(tar, packed(index, tar))
        return index

    def _index(self, tar: File) -> Index:
        path = self._root / tar.name
        try:
            with opened(path, tar) as file:
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

    def _beside(self, tar: File) -> Path | Remote:
        folder, _, base = tar.name.rpartition("/")
        return (self._root / folder if folder else self._root) / FOLDER / f"{base}.index"

    def _copy(self, tar: File) -> Path:
        """Return where the index of a tar is kept that cannot be kept beside it."""
        return self._cache / f"{tar.name}.index"

    def _find(self, tar: File) -> Index | None:
        for path in (self._copy(tar), self._beside(tar)):
            with contextlib.suppress(OSError, UserError):  # there is none, or it cannot be read
                if index := unpacked(_content(path), tar):
                    if isinstance(path, Remote):
                        write_whole(self._copy(tar), packed(index, tar))
                    return index
        return None

    def _keep(self, tar: File, data: bytes) -> None:
        beside, copy = self._beside(tar), self._copy(tar)
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


def _by_host(missing: Sequence[int], count: int) -> list[int]:
    """Return which of `count` tars to index, those of this host's part first, then the next."""
    cluster_state = cluster.state()
    hosts, host = cluster_state.num_processes or 1, cluster_state.process_id or 0
    first = host * count // hosts
    return sorted(missing, key=lambda number: (number - first) % count)


def _mapped(folder: Path) -> Joined | None:
    """Return the indexes that are joined in a folder, None if they are not."""
    try:
        about = json.loads((folder / _COUNTS).read_bytes())
        counts, notes = list(map(int, about["counts"])), str(about["notes"])
        path, shape = folder / _ENTRIES, (sum(counts),)
        if path.stat().st_size != sum(counts) * ENTRY.itemsize:
            return None
        entries = np.memmap(path, ENTRY, "r", shape=shape) if sum(counts) else np.empty(0, ENTRY)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return Joined(np.asarray(entries), counts, notes)


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
