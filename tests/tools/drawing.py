"""Helpers of the tests of tools that draw."""

import re
from pathlib import Path


def words_in(svg: Path) -> list[str]:
    """Return the texts of an SVG file, in order."""
    return re.findall(r">([^<>\s][^<>]*)</text>", svg.read_text(encoding="utf-8"))
