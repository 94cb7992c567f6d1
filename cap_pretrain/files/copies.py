"""Copies between buckets and local files, for libraries that read and write only local ones."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from cap_pretrain.errors import UserError
from cap_pretrain.files.places import is_url
from cap_pretrain.untrusted import parsing


@contextlib.contextmanager
def local(path: Path) -> Iterator[Path]:
    """Give a local path of the file or folder at `path`: itself, or a temporary copy from a bucket.

    The copy of a folder holds the files directly in it, not those in folders below. A UserError
    that is raised inside the context names the place in the bucket instead of the copy. Raises
    UserError if the bucket cannot be read.
    """
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="cap_pretrain_") as folder:
        copy = Path(folder) / path.name
        with parsing(path):
            _download(path, copy)
        try:
            yield copy
        except UserError as error:
            raise UserError(str(error).replace(str(copy), str(path))) from error


def local_folder(path: Path) -> Path:
    """Return a folder for what belongs to the folder `path` but must be local, as a database.

    It is `path` itself; for a bucket it is one of the user's cache, the same for each call, which
    may not exist.
    """
    if not is_url(path):
        return path
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    name = hashlib.sha256(str(path).rstrip("/").encode()).hexdigest()[:16]
    return cache / "cap_pretrain" / "of_buckets" / name


def upload(folder: Path, target: Path, last: Collection[str] = ()) -> None:
    """Copy the files of a local folder to a new folder of a bucket, or none of them.

    Files whose name is in `last` follow all others, those of the folder itself at the end: readers
    find the folder complete once these are there. Raises OSError.
    """
    from cap_pretrain.files import buckets

    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    found.sort(key=lambda own: (own.name in last, -len(own.parts), own.as_posix()))
    try:
        for own in found:
            with buckets.translating(target / own):  # in parts, which need little memory
                buckets.file_system().put_file(str(folder / own), str(target / own))
    except BaseException:
        for own in reversed(found):
            with contextlib.suppress(OSError):  # the first error is the one to report
                (target / own).unlink(missing_ok=True)
        raise


def _download(path: Path, copy: Path) -> None:
    if not path.is_dir():
        _fetch(path, copy)
        return
    copy.mkdir()
    for child in path.iterdir():
        if not child.name.startswith(".") and child.is_file():  # names may come from a stranger
            _fetch(child, copy / child.name)


def _fetch(path: Path, copy: Path) -> None:
    from cap_pretrain.files import buckets

    with buckets.translating(path):
        buckets.file_system().get_file(str(path), str(copy))
