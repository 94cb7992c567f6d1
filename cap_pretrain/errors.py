"""The exception for mistakes that the user can fix, and helpers for its messages."""

import difflib
import errno
import os
import re
from collections.abc import Iterable

# Errors of the disk, not of the program.
_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EROFS, errno.EACCES, errno.EPERM),  # not permitted
)


class UserError(Exception):
    """A mistake that the user can fix, shown without a traceback; the exit status is 2.

    One or two lines say which field or file is wrong, what was found there, and what to do.
    """


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the option closest to `word`, else a list of the options."""
    options = sorted(str(o) for o in options)
    near = difflib.get_close_matches(str(word), options, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Choose from: {', '.join(options)}." if options else ""


def disk_error(error: BaseException) -> str | None:
    """Return the disk problem that caused `error` ("No space left on device"), or None."""
    codes = []
    if isinstance(error, OSError):
        codes.append(error.errno)
    # TensorStore, which Orbax writes with, raises ValueErrors that contain the error number.
    codes += map(int, re.findall(r"\[os_error_code='(\d+)'", str(error)))
    codes += [errno.EACCES] * str(error).startswith("PERMISSION_DENIED")  # of a bucket
    for code in codes:
        if code in _DISK:
            return os.strerror(code)
    cause = error.__cause__ or error.__context__
    return disk_error(cause) if cause else None
