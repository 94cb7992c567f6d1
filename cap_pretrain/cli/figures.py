"""Create and save figures for the tools. matplotlib is an optional dependency of this module."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from cap_pretrain import untrusted
from cap_pretrain.errors import UserError

SUFFIXES = (".png", ".svg")
DPI = 128  # pixels per inch of pages; at 8 points, lower-case letters are about 8 pixels high
TITLE = 22  # pixels above a panel for its title


def imported(name: str) -> ModuleType:
    """Import a package of the extra `plots`; raise UserError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{name.partition('.')[0]} is not installed and is needed for this figure; "
            "pip install 'cap_pretrain[plots]'."
        ) from error


def new_figure(width: float, height: float) -> Any:
    """Return an empty matplotlib Figure of this size, in inches."""
    return imported("matplotlib.figure").Figure((width, height), layout="constrained")


def new_page(width: int, height: int) -> Any:
    """Return an empty matplotlib Figure of this size in pixels, to place panels on."""
    # Sizes in inches are exact, because DPI is a power of two.
    return imported("matplotlib.figure").Figure((width / DPI, height / DPI), dpi=DPI)


def fit_layout(figure: Any) -> None:
    """Move the axes of a figure to where they are when it is saved."""
    imported("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    figure.draw_without_rendering()


def place(page: Any, image: np.ndarray, x: int, y: int, title: str) -> None:
    """Draw an image [H, W, 3], pixel by pixel, with its upper left corner at (x, y).

    The title is above it, within `TITLE` pixels.
    """
    width, height = (round(side * DPI) for side in page.get_size_inches())
    rows, columns = image.shape[:2]
    page.figimage(image, x, height - y - rows)
    where = (x + columns / 2) / width, 1 - (y - 4) / height
    page.text(*where, title, fontsize=8, ha="center", va="baseline")


def save_pages(pages: Sequence[Any], out: Path) -> list[Path]:
    """Write figures to `out`, and further ones beside it: NAME-2.png, …; return their paths."""
    further = [out.with_stem(f"{out.stem}-{n}") for n in range(2, len(pages) + 1)]
    paths = [out, *further]
    for page, path in zip(pages, paths, strict=True):
        save(page, path)
    return paths


def check_name(out: Path) -> None:
    """Raise UserError if `save` does not support the suffix of this file name."""
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out: {str(out)!r} must end in {' or '.join(SUFFIXES)}.")


def save(figure: Any, out: Path) -> None:
    """Write a figure as PNG or SVG, by its suffix; equal figures give equal files."""
    matplotlib = imported("matplotlib")
    _show_texts_as_they_are(figure)
    svg = out.suffix.lower() == ".svg"
    # Deterministic ids, and text stored as text instead of outlines.
    with matplotlib.rc_context({"svg.hashsalt": "cap_pretrain", "svg.fonttype": "none"}):
        figure.savefig(out, metadata={"Date": None} if svg else None)


def _show_texts_as_they_are(figure: Any) -> None:
    """Make matplotlib draw the texts of a figure, which may come from data, without parsing them.

    It takes text between dollar signs for formulas. Numbers at axes are such formulas and stay.
    """
    ticks = figure.findobj(imported("matplotlib.axis").Tick)
    numbers = {id(label) for tick in ticks for label in (tick.label1, tick.label2)}
    for text in figure.findobj(imported("matplotlib.text").Text):
        if id(text) not in numbers:
            text.set_parse_math(False)
            text.set_text(untrusted.printable(text.get_text()))
