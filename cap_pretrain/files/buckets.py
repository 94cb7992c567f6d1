"""Objects in buckets of Google Cloud Storage, with the interface of `pathlib.Path`.

A bucket has no folders: an object's name contains slashes, and a folder exists while objects below
it do. Objects are written whole and atomically, and only as a whole; a rename is a copy and a
deletion. Requests that fail for a moment are repeated by gcsfs, for half a minute.
"""

import contextlib
import dataclasses
import email.utils
import errno
import fnmatch
import io
import os
from collections.abc import Iterator
from typing import Any

from etils.epath.gpath import PosixGPath
from etils.epath.stat_utils import StatResult

from cap_pretrain.files.markers import COMMITTED

# Packages whose exceptions gcsfs lets through.
_CLIENTS = ("aiohttp", "asyncio", "fsspec", "gcsfs", "google", "requests")


class Stat(StatResult):
    """The size and time of an object, by the names of `os.stat_result`, too."""

    @property
    def st_size(self) -> int:
        """Size in bytes."""
        return self.length

    @property
    def st_mtime(self) -> float:
        """Time of the last change, in seconds since 1970."""
        return self.mtime


@dataclasses.dataclass(frozen=True)
class Version:
    """The content of an object, its generation, and its age in seconds by the server's clock.

    The age is 0 if the server does not say it.
    """

    data: bytes
    generation: int
    age: float


class BucketPath(PosixGPath):
    """The path of an object, or of what begins the names of several; an `epath.Path` for Orbax.

    Methods raise OSError with an error number and the URL; see `translating`.
    """

    def exists(self) -> bool:
        """Return whether there is such an object, or one below this path."""
        return bool(self._kind())

    def is_dir(self) -> bool:
        """Return whether there are objects below this path."""
        return self._kind() == "directory"

    def is_file(self) -> bool:
        """Return whether there is such an object."""
        return self._kind() == "file"

    def is_symlink(self) -> bool:
        """Return False."""
        return False

    def absolute(self) -> "BucketPath":
        """Return this path."""
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":  # noqa: ARG002 - pathlib's
        """Return this path."""
        return self

    def expanduser(self) -> "BucketPath":
        """Return this path."""
        return self

    def iterdir(self) -> Iterator["BucketPath"]:
        """Yield what is directly below this path."""
        with translating(self):
            names = file_system().ls(str(self), detail=False)
        own = str(self).removeprefix("gs://")
        for name in names:
            if name.rstrip("/") != own:  # an empty object marks a folder in Google's console
                yield self / name.rstrip("/").rpartition("/")[2]

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yield the paths below this one that match a pattern, without "**"."""
        first, _, rest = pattern.partition("/")
        found: Iterator[BucketPath] = iter([self / first])
        if any(mark in first for mark in "*?["):
            entries = self.iterdir() if self.is_dir() else iter(())
            found = (path for path in entries if fnmatch.fnmatchcase(path.name, first))
        elif not rest and not (self / first).exists():
            found = iter(())
        for path in found:
            yield from path.glob(rest) if rest else [path]

    def rglob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yield the objects anywhere below this path whose last part matches a pattern."""
        for name in self.sizes():
            path = self / name
            if fnmatch.fnmatchcase(path.name, pattern):
                yield path

    def sizes(self) -> dict[str, int]:
        """Return the sizes in bytes of all objects below this path, by the rest of their names."""
        with translating(self):
            found = file_system().find(str(self), detail=True)
        own = str(self).removeprefix("gs://") + "/"
        return {n.removeprefix(own): int(about["size"]) for n, about in found.items() if n > own}

    def objects(self, pattern: str) -> list[str]:
        """Return the rests of the names of objects below this path that match a pattern, sorted.

        In the pattern, "*" stands for anything without a slash. Takes one request for each 1000
        that match.
        """
        bucket, _, name = str(self).removeprefix("gs://").partition("/")
        asked: dict[str, str] = {"prefix": f"{name}/", "matchGlob": f"{name}/{pattern}"}
        found: list[str] = []
        with contextlib.suppress(FileNotFoundError), translating(self):  # of a missing bucket
            while True:
                page = file_system().call("GET", "b/{}/o", bucket, json_out=True, **asked)
                found += [about["name"].removeprefix(f"{name}/") for about in page.get("items", ())]
                if "nextPageToken" not in page:
                    break
                asked["pageToken"] = page["nextPageToken"]
        return sorted(found)

    def stat(self) -> Stat:
        """Return the size and time of the object; a folder has size 0."""
        with translating(self):
            about = file_system().info(str(self))
        changed = about.get("mtime")
        return Stat(
            is_directory=about["type"] == "directory",
            length=about["size"],
            mtime=int(changed.timestamp()) if changed else 0,
        )

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:  # noqa: ARG002
        """Do nothing, since objects need no folder; raise FileExistsError as pathlib does."""
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))

    def rmdir(self) -> None:
        """Do nothing, since empty folders do not exist; raise OSError if this one is not."""
        if self.is_dir():
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(self))

    def rmtree(self, missing_ok: bool = False) -> None:
        """Remove all objects below this path.

        Those that say that a checkpoint is complete go first, so that what a kill leaves is none.
        """
        names = [f"{self}/{name}" for name in self.sizes()]
        if not names and not missing_ok:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        markers = [name for name in names if name.endswith(f"/{COMMITTED}")]
        for group in (markers, [name for name in names if name not in markers]):
            if group:
                with translating(self), contextlib.suppress(FileNotFoundError):
                    file_system().rm(group)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove the object."""
        with contextlib.suppress(*([FileNotFoundError] if missing_ok else [])), translating(self):
            file_system().rm_file(str(self))

    def rename(self, target: str | os.PathLike[str]) -> "BucketPath":
        """Give the object another name, replacing an object of that name."""
        fresh: BucketPath = self._new(target)
        with translating(self):
            if self._kind() == "directory":
                raise OSError(errno.EISDIR, "folders of a bucket cannot be renamed", str(self))
            file_system().mv_file(str(self), str(fresh))
        return fresh

    replace = rename

    def copy(self, dst: str | os.PathLike[str], overwrite: bool = False) -> "BucketPath":
        """Copy the object."""
        target = self._new(dst)
        put(target, self.read_bytes(), None if overwrite else 0)
        return target

    def open(
        self,
        mode: str = "r",
        *,
        encoding: str | None = None,
        errors: str | None = None,
        **_: Any,
    ) -> Any:
        """Open the object: its content when reading; a buffer, written when closed, when writing.

        Appending would overwrite it and raises ValueError; see `files.Appended`.
        """
        if mode.replace("b", "").replace("t", "") not in ("r", "w", "x"):
            raise ValueError(f"{self}: cannot be opened in mode {mode!r}")
        if "r" in mode:
            read = io.BytesIO(self.read_bytes())
            return read if "b" in mode else io.TextIOWrapper(read, encoding or "utf-8", errors)
        written = _Written(self, "x" in mode)
        return written if "b" in mode else _Text(written, encoding or "utf-8", errors)

    def read_bytes(self) -> bytes:
        """Return the content of the object."""
        with translating(self):
            return file_system().cat_file(str(self))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Return the content of the object as text."""
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
        """Write the object."""
        put(self, data)
        return len(data)

    def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, **_: Any
    ) -> int:
        """Write a text as the object."""
        self.write_bytes(data.encode(encoding or "utf-8", errors or "strict"))
        return len(data)

    def _kind(self) -> str:
        """Return "file", "directory", or "" if there is nothing."""
        try:
            with translating(self):
                return file_system().info(str(self))["type"]
        except FileNotFoundError:
            return ""


class _Written(io.BytesIO):
    """A buffer that becomes an object when it is closed, unless an exception ends its context."""

    def __init__(self, path: BucketPath, fresh: bool):
        super().__init__()
        self._path, self._fresh = path, fresh

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self.discard()
        self.close()

    def discard(self) -> None:
        """Close the buffer, and write nothing."""
        super().close()

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            put(self._path, data, 0 if self._fresh else None)


class _Text(io.TextIOWrapper):
    """The same for text."""

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.detach().discard()  # type: ignore[attr-defined]


def file_system() -> Any:
    """Return gcsfs's file system, which is shared; anonymous for an emulator."""
    import fsspec

    emulated = os.environ.get("STORAGE_EMULATOR_HOST")
    return fsspec.filesystem("gcs", **({"token": "anon"} if emulated else {}))


def put(path: BucketPath, data: bytes, generation: int | None = None) -> int:
    """Write an object in one request; return its generation.

    With a `generation`, it must be the present one, or 0 if there must be no such object, else
    FileExistsError is raised. It is also raised if an earlier try did succeed unnoticed.
    """
    fs = file_system()
    bucket, _, name = str(path).removeprefix("gs://").partition("/")
    with translating(path):
        about = fs.call(
            "POST",
            f"{fs._location}/upload/storage/v1/b/{{}}/o",
            bucket,
            uploadType="media",
            name=name,
            ifGenerationMatch=None if generation is None else str(generation),
            headers={"Content-Type": "application/octet-stream"},
            data=bytes(data),
            json_out=True,
        )
    return int(about["generation"])


def get(path: BucketPath) -> Version:
    """Read an object and its generation."""
    fs = file_system()
    with translating(path):
        headers, data = fs.call("GET", fs.url(str(path)))
    dates = [headers.get(name) for name in ("Date", "Last-Modified")]
    now, changed = (email.utils.parsedate_to_datetime(date or dates[0]) for date in dates)
    return Version(data, int(headers["X-Goog-Generation"]), (now - changed).total_seconds())


def remove(path: BucketPath, generation: int) -> None:
    """Remove an object if it is of this generation; else raise FileExistsError."""
    bucket, _, name = str(path).removeprefix("gs://").partition("/")
    with translating(path):
        match = str(generation)
        file_system().call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=match)


@contextlib.contextmanager
def translating(path: object) -> Iterator[None]:
    """Turn the errors of gcsfs into OSErrors with an error number and the URL."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno and error.filename:
            raise
        package = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and package not in _CLIENTS:
            raise
        code = _number(error)
        lines = str(error).strip().splitlines()
        reason = os.strerror(code) if code != errno.EIO else (lines or [type(error).__name__])[0]
        raise OSError(code, reason[:200], str(path)) from error


def _number(error: Exception) -> int:
    """Return the error number of an exception of gcsfs; EIO for all that are of the moment."""
    if isinstance(error, FileNotFoundError):
        return errno.ENOENT
    if isinstance(error, FileExistsError):  # also if another condition does not hold
        return errno.EEXIST
    denied = str(error).startswith("Forbidden") or getattr(error, "code", None) in (401, 403)
    return errno.EACCES if denied else errno.EIO
