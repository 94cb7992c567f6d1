"""The one exception that means "the user can fix this", and the hint that goes with it."""

import difflib
import errno
import os
import re
from collections.abc import Iterable

# What is the matter with somebody's disk, not with the program.
_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EROFS, errno.EACCES, errno.EPERM),  # forbidden
)


class UserError(Exception):
    """A mistake the user can mend: shown as one or two lines, without a traceback, exit code 2.

    The message names the field or file, what was found there, and what to do.
    """


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the option nearest to `word`, or the list of options."""
    options = sorted(str(o) for o in options)
    near = difflib.get_close_matches(str(word), options, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Choose from: {', '.join(options)}." if options else ""


def disk_error(error: BaseException) -> str | None:
    """Returns what is wrong with the disk ("No space left on device"), if that caused `error`."""
    codes = []
    if isinstance(error, OSError):
        codes.append(error.errno)
    # TensorStore, which Orbax writes with, has ValueErrors that end in the number.
    codes += map(int, re.findall(r"\[os_error_code='(\d+)'", str(error)))
    for code in codes:
        if code in _DISK:
            return os.strerror(code)
    cause = error.__cause__ or error.__context__
    return disk_error(cause) if cause else None
