"""Referring expressions of scenes: phrases that fit exactly one object."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from cap_pretrain.data.scenes.text import Phrase, Wording, describe
from cap_pretrain.data.scenes.world import (
    Scene,
    Thing,
    choose,
    clear_relation,
    relation_holds,
    shuffled,
)


def write(
    scene: Scene, rng: Random, *, plain: bool, partial: bool, relations: bool, synonyms: bool
) -> list[str]:
    """Return an expression for each object, such as "the striped circle above the red ring".

    It names the object's color and shape, and perhaps its size and pattern; with `partial`, less
    where that fits no other object; with `relations`, perhaps its position relative
    to another object. With `plain`, all name color and shape alone.
    """
    kinds: list[Callable[[Thing, Scene, Random, Wording], str | None]] = [_full]
    kinds += [_short] * partial + [_related] * relations
    found = []
    for thing in scene.things:
        wording = Wording(rng, synonyms)
        if plain:
            found.append(_definite(wording, Phrase(thing.colour, thing.shape)))
            continue
        kind = choose(rng, kinds)
        found.append(kind(thing, scene, rng, wording) or _full(thing, scene, rng, wording))
    return found


def _full(thing: Thing, _: Scene, rng: Random, wording: Wording) -> str:
    return _definite(wording, describe(thing, rng))


def _short(thing: Thing, scene: Scene, rng: Random, wording: Wording) -> str | None:
    """Return an expression without the color or the shape, or None if it fits others, too."""
    phrase = replace(describe(thing, rng), **{choose(rng, ("colour", "shape")): None})
    others = [other for other in scene.things if other is not thing]
    return None if any(map(phrase.fits, others)) else _definite(wording, phrase)


def _related(thing: Thing, scene: Scene, rng: Random, wording: Wording) -> str | None:
    """Return an expression with the position relative to another object, or None."""
    colour, shape = choose(rng, (thing.colour, None)), choose(rng, (thing.shape, None))
    phrase = Phrase(colour, shape)
    for anchor in shuffled(rng, scene.things):
        relation = None if anchor is thing else clear_relation(thing, anchor)
        if relation is None:
            continue
        others = [other for other in scene.things if other is not thing and other is not anchor]
        if any(phrase.fits(o) and relation_holds(o, relation, anchor) for o in others):
            continue
        known = _definite(wording, Phrase(anchor.colour, anchor.shape))
        return f"{_definite(wording, phrase)} {wording.relation(relation)} {known}"
    return None


def _definite(wording: Wording, phrase: Phrase) -> str:
    """Return a phrase in words, as in "the red circle"."""
    noun = wording.noun(phrase.colour, phrase.shape, phrase.size, phrase.pattern)
    return "the " + noun.partition(" ")[2]
