"""Dataset locations: local disks, and remote storage through fsspec (gs://, s3://, …).

ArrayRecord is read by C++ code with its own file systems: local ones and, since its pull request
172, Google's, for which we found no way to retry; none of fsspec's. So it reads local files, which
are made in one of two ways:

- `Copies`: a file is copied as a whole, when its first record is needed, to a folder that all
  processes of a machine share. This is for `data.order=global`, which reads records of some 50 KB
  in random order: soon all files are copied, so free disk space is checked first.
- `ranges.Ranges`: blocks of records are fetched into sparse files of the right size, as
  `data.order=blocks` needs them, and removed afterwards. Only lists of where records lie are
  decoded in Python (`riegeli`); the reader of the records checks their hashes, without which
  corruption would go unnoticed.

Credentials and endpoints are configured as for fsspec: by its environment variables
(FSSPEC_S3_ENDPOINT_URL, …), its files (~/.config/fsspec/), and those of s3fs, gcsfs and adlfs.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from cap_pretrain.errors import UserError, disk_error
from cap_pretrain.files.places import prepare_gcsfs
from cap_pretrain.untrusted import NotRegularError, TooLargeError

T = TypeVar("T")

TRIES = 8  # of every read; with the delays below they take 16 seconds on average, at most 32
# Upper bound in seconds of the delay before the second try; it doubles with every try. The delay is
# uniform between 0 and the bound ("full jitter", Brooker 2015, Exponential Backoff And Jitter, AWS
# Architecture Blog), so hosts that failed together do not retry together.
FIRST_DELAY = 0.25
_THREADS = 16  # files that an HTTP server is asked about at a time
CHUNK = 16 << 20  # bytes of a remote file in one request, and so in one retry

_PERMANENT = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(NotRegularError, TooLargeError),
)
# Errors that may be transient: those of a network disk or of the network.
_TRANSIENT = (
    *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.EREMOTEIO),
    *(errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.EPIPE),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)
# Packages whose errors fsspec's file systems do not wrap; these are retried.
_CLIENTS = ("aiohttp", "azure", "botocore", "gcsfs", "google")
# Entries of a listing that change with the content of a file; each file system has its own names.
STAMPS = ("etag", "ETag", "md5Hash", "mtime", "updated", "LastModified", "Last-Modified", "created")

_SHARD = re.compile(r"-\d{5,}-of-\d{5,}$")  # how TFDS names the files that hold records
_URL = re.compile(r"[A-Za-z][\w.:-]*://")
_JITTER = random.Random()  # separate from the random streams of a run


def retried(read: Callable[[], T]) -> T:
    """Return `read()`, retrying transient errors up to `TRIES` calls with exponential backoff."""
    for tries in range(1, TRIES):
        try:
            return read()
        except Exception as error:
            if not is_transient(error):
                raise
        time.sleep(_JITTER.uniform(0, FIRST_DELAY * 2 ** (tries - 1)))
    return read()


def is_transient(error: Exception) -> bool:
    """Return whether the same read may succeed a little later."""
    if isinstance(error, OSError):
        return not isinstance(error, _PERMANENT) and disk_error(error) is None
    if isinstance(error, RuntimeError):  # ArrayRecord's: "pread() failed: Input/output error"
        return any(f"failed: {os.strerror(code)}" in str(error) for code in _TRANSIENT)
    return type(error).__module__.partition(".")[0] in _CLIENTS


def why(error: BaseException) -> str:
    """Return the first clause of an error's message; those of ArrayRecord are very long."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().partition("\n")[0].partition(";")[0]


def cache_folder(cache: str = "") -> Path:
    """Return the folder for local copies; if none is named, one in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "cap_pretrain"
    return Path(cache or default).expanduser()


def locate(name: str) -> "Path | Remote":
    """Return the local path or remote location that a path or URL names; file:// is local.

    Raises UserError for a chain of file systems, some of which render templates.
    """
    name = name.removeprefix("file://")
    if "::" in name and "://" in name:
        raise UserError(f"{name}: chains of file systems (::) are not read; give a plain URL.")
    return Remote(name.rstrip("/")) if _URL.match(name) else Path(name).expanduser()


@dataclasses.dataclass(frozen=True)
class Remote:
    """A remote folder or file, with the part of pathlib's interface that is used here.

    Reads are retried (see `retried`). When that fails, they raise UserError with URL and reason.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        """The last component of the URL."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "Remote":
        """The folder that contains this one."""
        return Remote(self.url.rpartition("/")[0])

    def is_absolute(self) -> bool:
        """Return True: a URL is never relative."""
        return True

    def is_dir(self) -> bool:
        """Return whether this is a folder."""
        return self.call(lambda fs, path: fs.isdir(path))

    def is_file(self) -> bool:
        """Return whether this is a file."""
        return self.call(lambda fs, path: fs.isfile(path))

    def iterdir(self) -> Iterator["Remote"]:
        """Yield the entries of this folder."""
        for entry in self.call(lambda fs, path: fs.ls(path, detail=False)):
            yield self / entry.rstrip("/").rpartition("/")[2]

    def glob(self, pattern: str) -> Iterator["Remote"]:
        """Yield the paths below this folder that match a pattern, without "**"."""
        depth = pattern.count("/") + 1
        for found in self.call(lambda fs, path: fs.glob(f"{path}/{pattern}")):
            yield self / "/".join(found.split("/")[-depth:])

    def info(self) -> dict[str, Any]:
        """Return fsspec's info of this file; raise UserError if it lacks the size in bytes."""
        info = self.call(lambda fs, path: fs.info(path))
        if info.get("size") is None:
            raise UserError(f"{self.url}: the server does not say its size; copy the files.")
        return info

    def files(self) -> dict[str, dict[str, Any]]:
        """Return fsspec's info of each file by name; "size" in bytes is None on HTTP servers."""
        entries = self.call(lambda fs, path: fs.ls(path, detail=True))
        return {e["name"].rpartition("/")[2]: e for e in entries if e["type"] == "file"}

    def read_range(self, start: int, stop: int) -> bytes:
        """Return exactly the bytes from `start` up to `stop`."""

        def read(fs: Any, path: str) -> bytes:
            data = fs.cat_file(path, start=start, end=stop)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came instead of {stop - start}")
            return data

        return self.call(read)

    def call(self, method: Callable[[Any, str], T]) -> T:
        """Return `method(file system, path in it)`, retrying transient errors."""
        import fsspec

        prepare_gcsfs()
        try:
            fs, path = fsspec.core.url_to_fs(self.url)
            return retried(lambda: method(fs, path))
        except UserError:
            raise
        except Exception as error:
            missing = isinstance(error, FileNotFoundError)  # its message is only the name
            reason = "no such file or folder" if missing else why(error)
            tried = f", tried {TRIES} times" if is_transient(error) else ""
            raise UserError(
                f"{self.url}: cannot be read ({reason}{tried}); check that it exists and that you "
                "have permission to read it, then start again."
            ) from error


class Copies:
    """A remote dataset folder whose files are copied to a local folder when they are needed.

    Copies are atomic, and each is made once for all processes of a machine. A dataset that changes
    gets another local folder. Pickling keeps `files`, the listing of the remote folder. The local
    folder, `path`, lies below `cache` (by default the user's cache folder) and from the start holds
    all files except the shards. Raises UserError if the remote cannot be read, or the cache cannot
    be written.
    """

    def __init__(self, remote: Remote, cache: str = ""):
        self._remote = remote
        listed = self.files = _sized(remote, remote.files())
        self._sizes = {name: int(entry["size"]) for name, entry in listed.items()}
        stamps = sorted(
            (name, entry["size"], *(str(entry[key]) for key in STAMPS if key in entry))
            for name, entry in listed.items()
        )
        digest = hashlib.sha256(repr((remote.url, stamps)).encode()).hexdigest()[:16]
        name = re.sub(r"[^\w.-]+", "_", remote.url)[-100:]
        self.path = cache_folder(cache) / f"{name}-{digest}"
        self._complete: set[str] = set()
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
        for name in self._sizes:
            if not _SHARD.search(name):
                self.fetch(name)

    def __str__(self) -> str:
        return str(self._remote)

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return self._sizes[name]

    def has(self, name: str) -> bool:
        """Return whether a complete copy exists."""
        if name not in self._complete and _has_size(self.path / name, self._sizes[name]):
            self._complete.add(name)
        return name in self._complete

    def check_room(self, names: Iterable[str]) -> None:
        """Raise UserError if the disk has no room for copies of all these files."""
        needed = sum(self._sizes[name] for name in set(names) if not self.has(name))
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise UserError(
                f"data.cache: {self._remote} needs {needed / 1e9:,.1f} GB more in "
                f"{self.path.parent}, where {free / 1e9:,.1f} GB are free; name a folder on a "
                "larger disk."
            )

    def fetch(self, name: str) -> Path:
        """Return the local copy of a file, made if there is none; raises UserError if it fails."""
        if not self.has(name):
            with self._writing():
                self._copy(name)
            self._complete.add(name)
        return self.path / name

    def _copy(self, name: str) -> None:
        path, size = self.path / name, self._sizes[name]
        part = path.with_name(name + ".part")
        with part.open("ab") as file:
            # A process that waits here either finds the copy that another has made, or, if that one
            # was killed, a free lock and part of a file.
            fcntl.flock(file, fcntl.LOCK_EX)
            if _has_size(path, size):
                part.unlink(missing_ok=True)
                return
            file.truncate(0)
            for start in range(0, size, CHUNK):
                file.write((self._remote / name).read_range(start, min(start + CHUNK, size)))
            file.flush()
            os.fsync(file)  # or a machine crash could leave a file of full size without its bytes
            part.replace(path)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn errors of writing to the cache into a UserError."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"data.cache: cannot write to {self.path} ({why(error)}); make room or name "
                "another folder."
            ) from error


def _sized(folder: Remote, files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return infos with sizes; HTTP servers say them only when asked about each file."""

    def sized(name: str) -> dict[str, Any]:
        return files[name] if files[name].get("size") is not None else (folder / name).info()

    # Links with "?" in the listing of a web server sort it.
    names = [
        name for name, entry in files.items() if entry.get("size") is not None or "?" not in name
    ]
    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(sized, names), strict=True))


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
