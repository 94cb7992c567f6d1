"""Where datasets lie: on a local disk, or in any location that fsspec knows (gs://, s3://, …).

ArrayRecord's reader is C++ with file systems of its own: local ones, and lately Google's (its pull
request 172), which we could not make try again; none of fsspec's. To read ranges of its files
through fsspec would mean to write Riegeli's chunks, compression and hashes anew (without which
damage goes unnoticed), and training reads records in random order: each, of some 50 KB, would be a
request of its own. So a file is copied whole, when the first of its records is needed, to a local
folder that all processes of a machine share (`Copies`). As shuffling is over the whole dataset,
that soon holds all of it; whether there is room is looked at first.

Credentials and endpoints are those of fsspec: its environment variables (FSSPEC_S3_ENDPOINT_URL, …)
and files (~/.config/fsspec/), and what s3fs, gcsfs, adlfs look for.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from cap_pretrain.errors import UserError, disk_error

T = TypeVar("T")

TRIES = 8
"""Of every read. With the delays below they take 16 seconds on average, 32 at most."""

FIRST_DELAY = 0.25
"""Seconds: the bound of the delay before the second try, which doubles with each. The delay is
drawn between 0 and the bound ("full jitter", Brooker 2015, Exponential Backoff And Jitter, AWS
Architecture Blog), so that hosts that failed together do not come back together."""

CHUNK = 16 << 20
"""Bytes of a remote file that are read at a time, and again when that fails."""

_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# What may pass by itself: a disk in the network, or the way to it, has a bad moment.
_PASSING = (
    *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EREMOTEIO),
    *(errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EPIPE),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
# Packages whose errors fsspec's file systems let through as they are.
_CLIENTS = ("aiohttp", "azure", "botocore", "gcsfs", "google")
# What a listing says of a file that changes with its content, by the file systems' various names.
_STAMPS = ("etag", "ETag", "md5Hash", "mtime", "updated", "LastModified", "created")

_SHARD = re.compile(r"-\d{5,}-of-\d{5,}$")  # as TFDS names the files of records
_URL = re.compile(r"[A-Za-z][\w.:-]*://")
_JITTER = random.Random()  # by itself: nothing of a run follows from it


def retried(read: Callable[[], T]) -> T:
    """Returns `read()`, called again after a while when it fails in a way that may pass.

    Raises:
        Exception: of the last of `TRIES` calls, or of one that no other would mend.
    """
    for tries in range(1, TRIES):
        try:
            return read()
        except Exception as error:
            if not may_pass(error):
                raise
        time.sleep(_JITTER.uniform(0, FIRST_DELAY * 2 ** (tries - 1)))
    return read()


def may_pass(error: Exception) -> bool:
    """Whether the same read may succeed a little later."""
    if isinstance(error, OSError):
        return not isinstance(error, _LASTING) and disk_error(error) is None
    if isinstance(error, RuntimeError):  # ArrayRecord's: "pread() failed: Input/output error"
        return any(f"failed: {os.strerror(code)}" in str(error) for code in _PASSING)
    return type(error).__module__.partition(".")[0] in _CLIENTS


def why(error: BaseException) -> str:
    """The first clause of what it says: ArrayRecord goes on and on, with all of the path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().partition("\n")[0].partition(";")[0]


def locate(name: str) -> "Path | Remote":
    """The local path or the remote location of a name; file:// is local, too."""
    name = name.removeprefix("file://")
    return Remote(name.rstrip("/")) if _URL.match(name) else Path(name).expanduser()


@dataclasses.dataclass(frozen=True)
class Remote:
    """A folder or file that fsspec reads, with as much of pathlib's interface as is needed.

    Every method tries again as `retried` does, and raises UserError with the location and the
    reason when that does not help.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        return Remote(self.url.rpartition("/")[0])

    def is_absolute(self) -> bool:
        return True

    def is_dir(self) -> bool:
        return self._ask(lambda fs, path: fs.isdir(path))

    def is_file(self) -> bool:
        return self._ask(lambda fs, path: fs.isfile(path))

    def iterdir(self) -> Iterator["Remote"]:
        for entry in self._ask(lambda fs, path: fs.ls(path, detail=False)):
            yield self / entry.rstrip("/").rpartition("/")[2]

    def glob(self, pattern: str) -> Iterator["Remote"]:
        depth = pattern.count("/") + 1
        for found in self._ask(lambda fs, path: fs.glob(f"{path}/{pattern}")):
            yield self / "/".join(found.split("/")[-depth:])

    def files(self) -> dict[str, dict[str, Any]]:
        """What is known of each file of this folder, by name: "size" in bytes, and more."""
        entries = self._ask(lambda fs, path: fs.ls(path, detail=True))
        return {e["name"].rpartition("/")[2]: e for e in entries if e["type"] == "file"}

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes from `start` up to `stop`, all of them."""

        def read(fs: Any, path: str) -> bytes:
            data = fs.cat_file(path, start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came instead of {stop - start}")
            return data

        return self._ask(read)

    def _ask(self, question: Callable[[Any, str], T]) -> T:
        import fsspec

        try:
            fs, path = fsspec.core.url_to_fs(self.url)
            return retried(lambda: question(fs, path))
        except Exception as error:
            missing = isinstance(error, FileNotFoundError)  # which says the name alone
            reason = "no such file or folder" if missing else why(error)
            tried = f", tried {TRIES} times" if may_pass(error) else ""
            raise UserError(
                f"{self.url}: cannot be read ({reason}{tried}); see that it is there and that you "
                "may read it, and start again."
            ) from error


class Copies:
    """A remote folder of a dataset, whose files are copied to a local one as they are needed.

    A copy is there whole or not at all, and made once, whoever of a machine asks for it. When the
    dataset changes, so does the local folder. To pickle it takes what was listed along.

    Attributes:
        path: the local folder. It has all but the shards from the beginning.
    """

    def __init__(self, remote: Remote, cache: str = ""):
        """Lists `remote`; its copies are kept below the folder `cache`, by default the user's own.

        Raises:
            UserError: it cannot be read, or the cache not be written.
        """
        self._remote = remote
        listed = remote.files()
        self._sizes = {name: int(entry["size"]) for name, entry in listed.items()}
        stamps = sorted(
            (name, entry["size"], *(str(entry[key]) for key in _STAMPS if key in entry))
            for name, entry in listed.items()
        )
        digest = hashlib.sha256(repr((remote.url, stamps)).encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.-]+", "_", remote.url)[-100:]
        default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cap_pretrain"
        self.path = Path(cache or default).expanduser() / f"{name}-{digest}"
        self._whole: set[str] = set()
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
        for name in self._sizes:
            if not _SHARD.search(name):
                self.fetch(name)

    def __str__(self) -> str:
        return str(self._remote)

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def has(self, name: str) -> bool:
        """Whether there is a copy, so that `fetch` has nothing to do."""
        if name not in self._whole and _has_size(self.path / name, self._sizes[name]):
            self._whole.add(name)
        return name in self._whole

    def check_room(self, names: Iterable[str]) -> None:
        """Raises UserError if the disk has no room for copies of all these files."""
        needed = sum(self._sizes[name] for name in set(names) if not self.has(name))
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise UserError(
                f"data.cache: {self._remote} needs {needed / 1e9:,.1f} GB more in "
                f"{self.path.parent}, where {free / 1e9:,.1f} GB are free; name a folder on a "
                "larger disk."
            )

    def fetch(self, name: str) -> Path:
        """Returns a file's copy, making it unless it is there.

        Raises:
            UserError: the file cannot be read, the copy not be written.
        """
        if not self.has(name):
            with self._writing():
                self._copy(name)
            self._whole.add(name)
        return self.path / name

    def _copy(self, name: str) -> None:
        path, size = self.path / name, self._sizes[name]
        part = path.with_name(name + ".part")
        with part.open("ab") as file:
            # Who waits here finds that another has made the copy; or was killed: then the lock is
            # free and half a file there.
            fcntl.flock(file, fcntl.LOCK_EX)
            if _has_size(path, size):
                part.unlink(missing_ok=True)
                return
            file.truncate(0)
            for start in range(0, size, CHUNK):
                file.write((self._remote / name).read_range(start, min(start + CHUNK, size)))
            file.flush()
            os.fsync(file)  # or a crash of the machine might leave the size without the bytes
            part.replace(path)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Around what is written to the cache: a disk that does not take it is told as such."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"data.cache: cannot write to {self.path} ({why(error)}); make room or name "
                "another folder."
            ) from error


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
