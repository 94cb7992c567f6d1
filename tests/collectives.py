"""What a compiled program sends between devices."""

import math
import re
from typing import Any, NamedTuple

from tests import layouts

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


class Sent(NamedTuple):
    """What a step of training sends, and the shapes of all arrays there are on a device."""

    sent: list[Collective]
    computed: list[tuple[int, ...]]

    def shapes(self, *kinds: str) -> list[tuple[int, ...]]:
        """What is sent by collectives of these kinds."""
        return [tuple(shape) for kind, shapes in self.sent if kind in kinds for shape in shapes]

    def sizes(self, *kinds: str) -> list[int]:
        """How many numbers each of these has."""
        return [math.prod(shape) for shape in self.shapes(*kinds)]


def of_step(objective: str, layout: str, fields: dict[str, Any]) -> Sent:
    """Compiles the step of a small config; fields are those of `layouts.config`, "__" between."""
    fields = layouts.SMALL | {"model__heads": 8, "model__dropout": 0.0} | fields
    own = {name: fields.pop(name) for name in list(fields) if name.startswith("learner__")}
    c = layouts.config(objective, **fields)
    for name, value in own.items():
        c.learner[name.removeprefix("learner__")] = value
    program = layouts.Training(c, layout).program()
    return Sent(collectives(program), sorted(set(shapes_in(program))))
