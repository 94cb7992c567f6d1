"""Reading and parsing of files that come from strangers, with limits and one kind of error.

Every parser of such files is called inside `parsing`, so that whatever it raises becomes a
UserError that names the file. docs/security.md lists the limits.
"""

import contextlib
import functools
import gzip
import io
import json
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

from cap_pretrain.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")

MAX_RATIO = 200
"""Largest ratio of decompressed to compressed bytes beyond FREE_BYTES.

Text of captions and annotations compresses 3 to 20 times, gzip's maximum is 1032 (zlib's manual).
"""

FREE_BYTES = 2**26
"""Bytes that may be decompressed from any file, whatever its size."""

FREE_PARSED = 2**28
"""Bytes of memory that parsing a JSON file may take, beyond MAX_RATIO times the file's size."""

MAX_NAME = 100
"""Longest name of a split, dataset or class that becomes part of a file name, in bytes of UTF-8.

File systems allow 255 bytes; TFDS adds a suffix and temporary names.
"""

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")


class TooLargeError(OSError):
    """A file decompresses to more than its size justifies."""


class NotRegularError(OSError):
    """A FIFO, device, socket, folder or impossible name is where a file is expected."""


@contextlib.contextmanager
def parsing(where: object) -> Iterator[None]:
    """Turn every exception of a parser into a UserError that begins with `where`.

    Only parsing belongs inside: mistakes of this program would be hidden, too.

    Args:
        where: the file, and the place in it if it is known.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: cannot be read ({_reason(error)}).") from error


def parser(function: Callable[P, T]) -> Callable[P, T]:
    """Run a function that parses the file of its first argument inside `parsing`."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with parsing(args[0]):
            return function(*args, **kwargs)

    return wrapped


def _reason(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters, or what it is."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def parse_json(data: bytes | str, where: object) -> Any:
    """Parse JSON; raises UserError if it is invalid, nested too deeply or not UTF-8."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"{where}: is not JSON ({_reason(error)}).") from error


def check_parsed(data: bytes, path: Path) -> None:
    """Raise UserError if parsing JSON takes memory that the size of its file does not justify.

    Args:
        data: the content, decompressed.
        path: the file, perhaps gzipped: a megabyte of it can hold 90 million empty lists.
    """
    limit = FREE_PARSED + MAX_RATIO * path.stat().st_size
    if len(data) * max(_PARSED.values()) <= limit:
        return
    needed = len(data) * (1 if data.isascii() else 4)  # as str
    needed += sum(data.count(mark) * size for mark, size in _PARSED.items())
    if needed > limit:
        raise UserError(
            f"{path}: cannot be read (its content would take over {needed // 2**20} MB of memory)."
        )


_PARSED = {b"{": 200, b"[": 64, b'"': 30, b",": 40}
"""Bytes in memory that a character of JSON stands for: an object, list, half a text, a number."""


def entry(values: Any, name: str, kind: type[T] | tuple[type[T], ...], where: object) -> T:
    """Return `values[name]` after checking that `values` is a dict and the entry of type `kind`.

    True and False do not count as int. Raises UserError: "WHERE: NAME must be …, found …".
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be an object with {name!r}, found {shown(values)}.")
    if name not in values:
        raise UserError(f"{where}: {name!r} is missing.")
    return checked(values[name], name, kind, where)


def checked(value: Any, name: str, kind: type[T] | tuple[type[T], ...], where: object) -> T:
    """Return `value` if it is of type `kind`, else raise UserError; see `entry`."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(k.__name__ for k in kinds)
        raise UserError(f"{where}: {name!r} must be {expected}, found {shown(value)}.")
    return value


def bounded(value: Any, name: str, low: float, high: float, where: object, kind: Any = int) -> Any:
    """Return a number of type `kind` from `low` to `high`, else raise UserError; see `entry`."""
    checked(value, name, kind, where)
    if not low <= value <= high:  # NaN is not
        raise UserError(f"{where}: {name!r} must be from {low} to {high}, found {shown(value)}.")
    return value


def shown(value: Any) -> str:
    """Return a value from data for a message: printable, on one line, at most 80 characters."""
    text = repr(value) if not isinstance(value, (dict, list)) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:79] + "…"


def printable(text: str, keep: str = "") -> str:
    """Return text from data with control characters, line breaks and lone surrogates escaped.

    The escapes are those of JSON, so this keeps JSON valid. Characters in `keep` are not escaped.
    """
    return _UNPRINTABLE.sub(lambda m: m[0] if m[0] in keep else json.dumps(m[0])[1:-1], text)


def path_part(name: Any, what: str, where: object) -> str:
    """Return a name from data that is safe as one part of a path.

    Args:
        name: the name, of any type.
        what: what it names, for the message ("split").
        where: the file it comes from.

    Raises:
        UserError: it is not a string, is empty, "." or "..", starts with a dot or a dash, has a
            slash, backslash, control character or lone surrogate, or is longer than MAX_NAME bytes.
    """
    problem = ""
    if not isinstance(name, str):
        problem = "must be a string"
    elif not name.strip() or name[0] in ".-~":
        problem = "must not be empty or start with . - ~"
    elif any(c in '/\\:*?"<>|' or not c.isprintable() for c in name):
        problem = 'must not contain / \\ : * ? " < > | or unprintable characters'
    elif len(name.encode()) > MAX_NAME:
        problem = f"must have at most {MAX_NAME} bytes"
    if problem:
        raise UserError(f"{where}: {what} {shown(name)} {problem}.")
    return name


def is_text(value: str) -> bool:
    """Return whether a string can be encoded, that is, has no lone surrogate."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def mended(value: str) -> str:
    """Return a string with U+FFFD in place of lone surrogates, and pairs of them joined."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def legible(name: str) -> str:
    """Return a name with lone surrogates escaped, such as those of bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; raises NotRegularError for anything else.

    The file is opened without blocking and checked afterwards, so it cannot be exchanged between.
    An object of a bucket (`files.place`) is read as a whole.
    """
    if not isinstance(path, (str, Path)):
        return io.BufferedReader(io.BytesIO(path.read_bytes()))
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a null byte
        raise NotRegularError(f"not a regular file: {path}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotRegularError(f"not a regular file: {path}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def open_bounded(path: Path) -> BinaryIO:
    """Open a regular file for reading, decompressing gzip under the limits above.

    Returns:
        A binary file. Reading it raises TooLargeError once more has been decompressed than
        FREE_BYTES plus MAX_RATIO times the size of the file.
    """
    file = open_regular(path)
    if file.peek(2)[:2] != b"\x1f\x8b":  # type: ignore[attr-defined]  # a BufferedReader
        return file
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    limit = FREE_BYTES + MAX_RATIO * size
    return io.BufferedReader(_Bounded(gzip.GzipFile(fileobj=file), file, limit, path), 2**16)


def check_stored(path: Path) -> None:
    """Raise UserError if `path` is a zip file whose members claim more bytes than it has.

    For formats whose members are stored as they are, so that reading needs as much memory.
    """
    with parsing(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                claimed = sum(member.file_size for member in file.infolist())
            if claimed > path.stat().st_size:
                raise TooLargeError("its members claim more bytes than the file has")


class _Bounded(io.RawIOBase):
    """A decompressed stream that ends in TooLargeError after `limit` bytes."""

    def __init__(self, stream: gzip.GzipFile, file: BinaryIO, limit: int, path: Path):
        self._stream, self._file, self._left, self._path = stream, file, limit, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read1(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise TooLargeError(
                f"{self._path.name} decompresses to over {MAX_RATIO} times its size"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
            self._file.close()
        super().close()


def _first(file: BinaryIO, most: int) -> bytes:
    """Return up to `most` bytes of a file, without reserving memory for more than it has."""
    parts: list[bytes] = []
    while most and (part := file.read(min(most, 2**20))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def read_bounded(path: Path, most: int = -1) -> bytes:
    """Return the content of a regular file, decompressed under the limits of `open_bounded`.

    Of a longer content only the first `most` bytes are read, if that is not -1.

    Raises:
        UserError: it is missing, not a regular file, damaged, or decompresses to too much.
    """
    try:
        with open_bounded(path) as file:
            return file.read() if most < 0 else _first(file, most)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.") from error
    except (OSError, EOFError, zlib.error, MemoryError) as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}).") from error
