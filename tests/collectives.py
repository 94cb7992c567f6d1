"""Parsing what a compiled program sends between devices."""

import math
import re
from typing import Any, NamedTuple

from tests import layouts

_KINDS = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all|ragged-all-to-all"
_LINE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_SHAPE = re.compile(r"\b[a-z]+\d+\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective: its kind, and the shape of each of its results on one device."""

    kind: str
    shapes: list[tuple[int, ...]]


def shapes_in(text: str) -> list[tuple[int, ...]]:
    """Return the shapes of all arrays in the text of a program."""
    return [tuple(map(int, filter(None, dims.split(",")))) for dims in _SHAPE.findall(text)]


def collectives(program: str) -> list[Collective]:
    """Return the collectives of a compiled program as XLA prints it; loop bodies count once."""
    return [Collective(kind, shapes_in(out)) for out, kind in _LINE.findall(program)]


class Sent(NamedTuple):
    """What a training step sends, and the shapes of all its arrays on one device."""

    sent: list[Collective]
    computed: list[tuple[int, ...]]

    def shapes(self, *kinds: str) -> list[tuple[int, ...]]:
        """Return the shapes sent by collectives of these kinds."""
        return [tuple(shape) for kind, shapes in self.sent if kind in kinds for shape in shapes]

    def sizes(self, *kinds: str) -> list[int]:
        """Return the number of elements of each of these shapes."""
        return [math.prod(shape) for shape in self.shapes(*kinds)]


def of_step(objective: str, layout: str, fields: dict[str, Any]) -> Sent:
    """Compile the training step of a small config.

    Args:
        objective: a name of `layouts.OBJECTIVES`.
        layout: a name of `layouts.LAYOUTS`.
        fields: config fields as for `layouts.config`, with "__" for the dot.
    """
    fields = layouts.SMALL | {"model__heads": 8, "model__dropout": 0.0} | fields
    own = {name: fields.pop(name) for name in list(fields) if name.startswith("learner__")}
    c = layouts.config(objective, **fields)
    for name, value in own.items():
        c.learner[name.removeprefix("learner__")] = value
    program = layouts.Training(c, layout).program()
    return Sent(collectives(program), sorted(set(shapes_in(program))))
