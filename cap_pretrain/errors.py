"""The one exception that means "the user can fix this", and the hint that goes with it."""

import difflib
from collections.abc import Iterable


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
