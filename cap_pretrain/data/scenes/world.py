"""The contents of scenes, and how they are drawn at random.

Lengths and positions are fractions of the image side, with x to the right and y downwards, so a
scene has no resolution. Random numbers come from `random.Random.random`, the only stream that
Python guarantees never to change.
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

# Pairs held out for the split novel. Each color and each shape occurs exactly once. The set does
# not depend on the options, so an encoder trained on six colors has not seen these either.
HELD_OUT = frozenset((c, SHAPES[(k + 1) % len(SHAPES)]) for k, c in enumerate(COLOURS))

SMALLEST = 0.115  # radius; 11 pixels across in images of 48, where shapes can be distinguished
_LARGEST = (0.30, 0.25, 0.21)  # radius of the main object among one, two, three objects
_STEP = 1.2  # ratio of radii from one object to the next at least, so the main one stands out
_SMALL, _BIG = 0.135, 0.18  # radii below and above which captions may name the size
_GAP = 0.02  # smallest distance between two objects, and to the border
_DARK, _LIGHT = 90.0, 170.0  # gray levels below and above which a background is called so
_CLEAR = 1.3  # a relation is clear if one offset exceeds the other by this factor
_TURN = math.radians(15)  # small enough that a square never looks like a diamond

T = TypeVar("T")
Pair = tuple[str, str]  # color, shape


def choose(rng: Random, options: Sequence[T]) -> T:
    """Return one of `options`, each equally likely."""
    return options[int(rng.random() * len(options))]


def between(rng: Random, low: float, high: float) -> float:
    """Return a number drawn uniformly from [low, high)."""
    return low + (high - low) * rng.random()


def shuffled(rng: Random, items: Sequence[T]) -> list[T]:
    """Return the items in random order."""
    result = list(items)
    for last in range(len(result) - 1, 0, -1):
        other = int(rng.random() * (last + 1))
        result[last], result[other] = result[other], result[last]
    return result


@dataclass(frozen=True, slots=True)
class Thing:
    """An object of a scene: one of `COLOURS`, of `SHAPES` and of `PATTERNS`.

    `x` (from the left), `y` (from the top) and `radius` are of the circumscribed circle; `angle` is
    the rotation, in radians; `tint` is added to RGB, each in [-1, 1] of the renderer's range.
    """

    colour: str
    shape: str
    pattern: str
    x: float
    y: float
    radius: float
    angle: float
    tint: tuple[float, float, float]

    @property
    def pair(self) -> Pair:
        """Color and shape."""
        return self.colour, self.shape

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the bounding square of the circle."""
        x, y, radius = self.x, self.y, self.radius
        return x - radius, y - radius, x + radius, y + radius

    @property
    def size(self) -> str | None:
        """The word small or big, or None if neither applies."""
        return "small" if self.radius < _SMALL else "big" if self.radius > _BIG else None


@dataclass(frozen=True, slots=True)
class Background:
    """Smooth tones: a grid of gray levels that is stretched over the image.

    `level` is the mean gray level, 0 to 255; `tones` are the gray levels [cells * cells]; `tint` is
    added to the RGB color, each in [-1, 1] of the renderer's range.
    """

    level: float
    cells: int
    tones: tuple[float, ...]
    tint: tuple[float, float, float]

    @property
    def brightness(self) -> str | None:
        """The word dark or light, or None if neither applies."""
        return "dark" if self.level < _DARK else "light" if self.level > _LIGHT else None


PLAIN = Background(level=128.0, cells=1, tones=(128.0,), tint=(0.0, 0.0, 0.0))


@dataclass(frozen=True, slots=True)
class Scene:
    """One to three objects that do not overlap, on a background.

    The largest object, the main one, is first. Color-shape pairs differ, so a pair identifies an
    object. `noise` is a fraction of the largest strength (`ScenesOptions.noise`); `noise_seed`, in
    [0, 1), chooses the pattern of the noise.
    """

    things: tuple[Thing, ...]
    background: Background
    noise: float
    noise_seed: float

    @property
    def pairs(self) -> list[Pair]:
        """Color and shape of every object."""
        return [thing.pair for thing in self.things]

    def labels(self) -> dict[str, str]:
        """Return the main object's shape, colour, relation to the second largest, and the count."""
        main = self.things[0]
        relation = clear_relation(main, self.things[1]) if len(self.things) > 1 else None
        return {
            "shape": main.shape,
            "colour": main.colour,
            "count": str(len(self.things)),
            "relation": relation or "none",
        }


def clear_relation(a: Thing, b: Thing) -> str | None:
    """Return the position of `a` relative to `b`: left, right, above, below; None if diagonal."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > _CLEAR * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) > _CLEAR * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def relation_holds(a: Thing, relation: str, b: Thing) -> bool:
    """Return whether `a` is on the side `relation` of `b`, by any distance."""
    dx, dy = a.x - b.x, a.y - b.y
    return {"left": dx < 0, "right": dx > 0, "above": dy < 0, "below": dy > 0}[relation]


def pairs_of(colours: int, shapes: int, held_out: bool) -> list[Pair]:
    """Return the pairs of the first `colours` colors and `shapes` shapes, held out or not."""
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
    """Draw a scene of objects with different pairs, of which `pairs` has at least `max_objects`.

    `smallest` is the smallest radius of an object, at most `largest_smallest(max_objects)`.
    `patterns` gives half of the objects a pattern; `backgrounds` lets the background vary.
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
    """Return the largest possible radius of the smallest of `objects` objects."""
    return _LARGEST[objects - 1] / _STEP ** (objects - 1)


def _places(rng: Random, count: int, smallest: float) -> list[tuple[float, float, float]]:
    """Draw (x, y, radius) of `count` circles apart, largest first, the first two not diagonal."""
    draw = rng.random
    while True:
        places: list[tuple[float, float, float]] = []
        ceiling = _LARGEST[count - 1]
        for rank in range(count):
            radius = between(rng, smallest * _STEP ** (count - 1 - rank), ceiling)
            ceiling = radius / _STEP
            margin = radius + _GAP
            span = 1 - margin - margin  # as `between` computes it, without its call
            for _ in range(8):
                x, y = margin + span * draw(), margin + span * draw()
                if _fits(x, y, radius, places):
                    places.append((x, y, radius))
                    break
        if len(places) == count:
            return places


def _fits(x: float, y: float, radius: float, places: list[tuple[float, float, float]]) -> bool:
    for px, py, pr in places:
        if math.hypot(x - px, y - py) < radius + pr + _GAP:
            return False
    if len(places) != 1:
        return True
    dx, dy = abs(x - places[0][0]), abs(y - places[0][1])
    return max(dx, dy) > _CLEAR * min(dx, dy)


def _background(rng: Random) -> Background:
    """Draw a background that is flat, shaded from corner to corner, or cloudy."""
    cells = choose(rng, (1, 2, 4))
    level = between(rng, 45, 215)
    depth = between(rng, 10, 35) if cells > 1 else 0.0
    tones = tuple(level + between(rng, -depth, depth) for _ in range(cells * cells))
    return Background(level, cells, tones, _tint(rng))


def _tint(rng: Random) -> tuple[float, float, float]:
    return between(rng, -1, 1), between(rng, -1, 1), between(rng, -1, 1)
