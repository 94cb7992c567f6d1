"""Reading a checkpoint on several hosts, which succeed together or fail with the same error."""

import errno
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from cap_pretrain import files
from cap_pretrain.checkpoints.manifest import CorruptCheckpointError
from cap_pretrain.distributed import cluster
from cap_pretrain.errors import UserError, disk_error

# Reading may fail for these reasons although the checkpoint is valid.
_TRANSIENT_FAILURES = (
    *("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
    *("ABORTED", "UNAUTHENTICATED", "CANCELLED"),
)
# Errors of reading that files which are missing, or damaged metadata, cause each time.
_LASTING = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
)
# The kinds of failures, most specific first.
_DISK, _TRANSIENT, _CORRUPT = "disk", "transient", "corrupt"


class ReadingFailedError(Exception):
    """Reading failed on some host; every host raises this, with the same `kind` and `reason`."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def agree(error: Exception | None, fact: Any = None) -> Any:
    """Return the JSON value `fact` of host 0; raise ReadingFailedError if any host has an `error`.

    All hosts must call it.
    """
    kind, reason = _describe(error) if error else ("", "")

    def decide(hosts: list[list[Any]]) -> list[Any]:
        failures = {kind: reason for kind, reason, _ in reversed(hosts) if kind}
        for each in (_DISK, _TRANSIENT, _CORRUPT):
            if each in failures:
                return [each, failures[each], None]
        return hosts[0]

    kind, reason, answer = cluster.decided([kind, reason, fact], decide)
    if kind:
        raise ReadingFailedError(kind, reason) from error
    return answer


def read_on_all_hosts(folder: Path, read: Callable[[], Any]) -> Any:
    """Return `read()`. All hosts must call it, and if it fails on one, it fails on all.

    Raises:
        UserError: the disk of a host does not permit reading.
        CorruptCheckpointError: files of the checkpoint are corrupt.
        OSError: the bucket of the checkpoint is out of reach of a host.
        ReadingFailedError: reading failed on another host for another passing reason, such as a
            lack of memory; on that host itself, the error is raised as it is.
    """
    result, error = None, None
    try:
        try:
            with warnings.catch_warnings():
                # Orbax leaves coroutines behind when it fails.
                warnings.simplefilter("ignore", RuntimeWarning)
                result = read()
        except ReadingFailedError:  # the hosts have agreed already
            raise
        except Exception as e:
            error = e
        agree(error)
    except ReadingFailedError as failure:
        if failure.kind == _DISK:
            raise UserError(f"{folder}: cannot be read ({failure.reason}).") from failure
        if failure.kind == _CORRUPT:
            found = f"{folder}: is corrupt ({failure.reason[:200]})"
            known = failure.reason.startswith(f"{folder}: ")  # of a CorruptCheckpointError
            raise CorruptCheckpointError(failure.reason if known else found) from failure
        raise out_of_reach(failure, folder) or error or failure from None
    return result


def out_of_reach(error: Exception, place: Path) -> OSError | None:
    """Return the OSError that names `place` if its bucket was out of reach, else None."""
    kind, reason = _describe(error)
    own: BaseException | None = error
    if isinstance(error, ReadingFailedError):
        kind, reason, own = error.kind, error.reason, error.__cause__
    of_memory = isinstance(own, (MemoryError, jax.errors.JaxRuntimeError))
    if kind != _TRANSIENT or of_memory or not files.is_url(place):
        return None
    return OSError(errno.EIO, reason[:200], str(place))


def _describe(error: Exception) -> tuple[str, str]:
    """Return the kind of a failure to read, and its reason in one line."""
    if reason := disk_error(error):
        return _DISK, reason
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    cause: BaseException | None = error
    while cause:
        passes = isinstance(cause, OSError) and cause.errno and cause.errno not in _LASTING
        coded = any(code in str(cause) for code in _TRANSIENT_FAILURES)
        if passes or coded or isinstance(cause, (MemoryError, TimeoutError, ConnectionError)):
            return _TRANSIENT, reason
        cause = cause.__cause__ or cause.__context__
    return _CORRUPT, reason
