"""What a compiled program sends between devices."""

import re
from typing import NamedTuple

_KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all"
_LINE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_SHAPE = re.compile(r"\b[a-z]+\d+\[([\d,]*)\]")


class Collective(NamedTuple):
    """One of them: its kind, and the shape of each array that comes out of it on a device."""

    kind: str
    shapes: list[tuple[int, ...]]


def shapes_in(text: str) -> list[tuple[int, ...]]:
    """The shapes of all arrays that a part of a program names."""
    return [tuple(map(int, filter(None, dims.split(",")))) for dims in _SHAPE.findall(text)]


def collectives(program: str) -> list[Collective]:
    """Those of a program as XLA prints it when compiled; what a loop repeats is there once."""
    return [Collective(kind, shapes_in(out)) for out, kind in _LINE.findall(program)]
