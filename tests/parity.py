"""Packages of the extra `parity`: tests that need them carry `@pytest.mark.parity`."""

from types import ModuleType

import pytest


def require(name: str) -> ModuleType:
    """Import a package, or skip the test (or the test module) that needs it."""
    reason = f"{name} is not installed: pip install -e '.[parity]'"
    return pytest.importorskip(name, reason=reason)
