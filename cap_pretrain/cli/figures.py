"""Figures as files: what the tools that draw have in common. matplotlib is imported here alone."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from cap_pretrain.errors import UserError

SUFFIXES = (".png", ".svg")


def imported(name: str) -> ModuleType:
    """Imports a package of the extra `plots`; raises UserError if it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name.partition('.')[0]} is not installed, without which this cannot be drawn; "
            "pip install 'cap_pretrain[plots]'."
        ) from error


def new_figure(width: float, height: float) -> Any:
    """Returns a matplotlib Figure of this size, in inches."""
    return imported("matplotlib.figure").Figure((width, height), layout="constrained")


def check_name(out: Path) -> None:
    """Raises UserError if `save` would not write a file of this name."""
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out: {str(out)!r} ends in neither {' nor '.join(SUFFIXES)}.")


def save(figure: Any, out: Path) -> None:
    """Writes a figure as PNG or SVG, by the name; the same figure gives the same file.

    Raises:
      OSError: it cannot be written.
    """
    matplotlib = imported("matplotlib")
    svg = out.suffix.lower() == ".svg"
    # Ids that are not drawn by lot, and text that stays text.
    with matplotlib.rc_context({"svg.hashsalt": "cap_pretrain", "svg.fonttype": "none"}):
        figure.savefig(out, metadata={"Date": None} if svg else None)
