"""The memory that a part of a test takes, whatever the process has used before."""

import contextlib
from pathlib import Path


def _peak():
    """Return the largest resident memory since the last reset, in KiB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


@contextlib.contextmanager
def below(kib):
    """Assert that memory never grows by more inside the context (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (man 5 proc)
    before = _peak()
    yield
    assert _peak() - before < kib
