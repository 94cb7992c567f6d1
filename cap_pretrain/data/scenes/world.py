"""What a scene may hold, and how one is drawn by lot.

Lengths and positions are fractions of the image side, x to the right and y downwards, so a scene
has no resolution. Randomness comes from `random.Random.random`, the one stream that Python promises
never to change.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "pink", "cyan")
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond")
PATTERNS = ("solid", "striped", "dotted", "checkered")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
MAX_OBJECTS = 3

# Each colour and each shape is held out exactly once. The table does not depend on the options, so
# an encoder trained on six colours has not seen these either.
HELD_OUT = frozenset((c, SHAPES[(k + 1) % len(SHAPES)]) for k, c in enumerate(COLOURS))

SMALLEST = 0.115  # radius: 11 pixels across at 48, where the shapes can still be told apart
_LARGEST = (0.30, 0.25, 0.21)  # radius of the main object among one, two, three objects
_STEP = 1.2  # each object is at least this much larger than the next, so "the main one" is visible
_SMALL, _BIG = 0.135, 0.18  # radii below and above which people are taken to name the size
_GAP = 0.02  # least distance between two objects, and to the border
_DARK, _LIGHT = 90.0, 170.0  # grey levels below and above which a background is called so
_CLEAR = 1.3  # a relation is clear when one offset exceeds the other by this factor
_TURN = math.radians(15)  # small enough that a square never looks like a diamond

T = TypeVar("T")
Pair = tuple[str, str]  # colour, shape


def choose(rng: Random, options: Sequence[T]) -> T:
    """One of `options`, each equally likely."""
    return options[int(rng.random() * len(options))]


def between(rng: Random, low: float, high: float) -> float:
    """A number drawn evenly from [low, high)."""
    return low + (high - low) * rng.random()


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """The items in an order drawn by lot."""
    items = list(items)
    for last in range(len(items) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        items[last], items[other] = items[other], items[last]
    return items


@dataclass(frozen=True, slots=True)
class Thing:
    """An object: its names, its circumscribed circle, its rotation (radians), its tint."""

    colour: str
    shape: str
    pattern: str
    x: float
    y: float
    radius: float
    angle: float
    tint: tuple[float, float, float]  # added to the colour, each in [-1, 1] of the renderer's range

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the square around its circle."""
        x, y, radius = self.x, self.y, self.radius
        return x - radius, y - radius, x + radius, y + radius

    @property
    def size(self) -> str | None:
        """ "small", "big", or None when neither word would be used."""
        return "small" if self.radius < _SMALL else "big" if self.radius > _BIG else None


@dataclass(frozen=True, slots=True)
class Background:
    """Smooth tones: a grid of grey levels [cells * cells] to be stretched over the image."""

    level: float  # the mean grey level, 0..255
    cells: int
    tones: tuple[float, ...]
    tint: tuple[float, float, float]

    @property
    def brightness(self) -> str | None:
        """ "dark", "light", or None when neither word would be used."""
        return "dark" if self.level < _DARK else "light" if self.level > _LIGHT else None


PLAIN = Background(level=128.0, cells=1, tones=(128.0,), tint=(0.0, 0.0, 0.0))


@dataclass(frozen=True, slots=True)
class Scene:
    """One to three objects that never overlap, the largest (the main one) first.

    The colour-shape pairs of a scene differ, so that a pair names one object. `noise` is the
    strength drawn for this image (1 = the option's maximum), `noise_seed` in [0, 1) its instance.
    """

    things: tuple[Thing, ...]
    background: Background
    noise: float
    noise_seed: float

    @property
    def pairs(self) -> list[Pair]:
        return [thing.pair for thing in self.things]

    def labels(self) -> dict[str, str]:
        """The class of the scene under each labelling: `shape` and `colour` of the main object,
        `count`, and `relation`: where the main object lies as seen from the second largest.
        """
        main = self.things[0]
        relation = clear_relation(main, self.things[1]) if len(self.things) > 1 else None
        return {
            "shape": main.shape,
            "colour": main.colour,
            "count": str(len(self.things)),
            "relation": relation or "none",
        }


def clear_relation(a: Thing, b: Thing) -> str | None:
    """Where `a` lies as seen from `b`: left, right, above, below; None when it lies diagonally."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > _CLEAR * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > _CLEAR * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def relation_holds(a: Thing, relation: str, b: Thing) -> bool:
    """Whether one could say that `a` is `relation` of `b`, however slightly."""
    dx, dy = a.x - b.x, a.y - b.y
    return {"left": dx < 0, "right": dx > 0, "above": dy < 0, "below": dy > 0}[relation]


def pairs_of(colours: int, shapes: int, held_out: bool) -> list[Pair]:
    """The pairs of the first `colours` colours and `shapes` shapes that are (not) held out."""
    every = [(c, s) for c in COLOURS[:colours] for s in SHAPES[:shapes]]
    return [pair for pair in every if (pair in HELD_OUT) == held_out]


def draw_scene(
    rng: Random,
    pairs: Sequence[Pair],
    *,
    min_objects: int,
    max_objects: int,
    smallest: float,
    patterns: bool,
    backgrounds: bool,
) -> Scene:
    """Draws a scene whose objects bear distinct `pairs` (at least `max_objects` of them).

    `smallest` is the least radius of an object, at most `largest_smallest(max_objects)`.
    """
    count = min_objects + int(rng.random() * (max_objects - min_objects + 1))
    named: list[Pair] = []
    while len(named) < count:
        pair = choose(rng, pairs)
        if pair not in named:
            named.append(pair)
    things = []
    for (colour, shape), (x, y, radius) in zip(named, _places(rng, count, smallest), strict=True):
        pattern = choose(rng, PATTERNS[1:]) if patterns and rng.random() < 0.5 else PATTERNS[0]
        angle = between(rng, -_TURN, _TURN)
        things.append(Thing(colour, shape, pattern, x, y, radius, angle, _tint(rng)))
    background = _background(rng) if backgrounds else PLAIN
    return Scene(tuple(things), background, noise=rng.random(), noise_seed=rng.random())


def largest_smallest(objects: int) -> float:
    """The radius that the smallest of so many objects can have at most."""
    return _LARGEST[objects - 1] / _STEP ** (objects - 1)


def _places(rng: Random, count: int, smallest: float) -> list[tuple[float, float, float]]:
    """x, y and radius of `count` circles, largest first: apart, and the first two not diagonal."""
    while True:
        places: list[tuple[float, float, float]] = []
        ceiling = _LARGEST[count - 1]
        for rank in range(count):
            radius = between(rng, smallest * _STEP ** (count - 1 - rank), ceiling)
            ceiling = radius / _STEP
            margin = radius + _GAP
            for _ in range(8):
                x, y = between(rng, margin, 1 - margin), between(rng, margin, 1 - margin)
                if _fits(x, y, radius, places):
                    places.append((x, y, radius))
                    break
        if len(places) == count:
            return places


def _fits(x: float, y: float, radius: float, places: list[tuple[float, float, float]]) -> bool:
    if any(math.hypot(x - px, y - py) < radius + pr + _GAP for px, py, pr in places):
        return False
    if len(places) != 1:
        return True
    dx, dy = abs(x - places[0][0]), abs(y - places[0][1])
    return max(dx, dy) > _CLEAR * min(dx, dy)


def _background(rng: Random) -> Background:
    """Flat, shaded from corner to corner, or cloudy."""
    cells = choose(rng, (1, 2, 4))
    level = between(rng, 45, 215)
    depth = between(rng, 10, 35) if cells > 1 else 0.0
    tones = tuple(level + between(rng, -depth, depth) for _ in range(cells * cells))
    return Background(level, cells, tones, _tint(rng))


def _tint(rng: Random) -> tuple[float, float, float]:
    return between(rng, -1, 1), between(rng, -1, 1), between(rng, -1, 1)
