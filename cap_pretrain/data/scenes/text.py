"""Captions of scenes: write true and false ones, and parse any caption.

The content of a caption (a `Claim`) is separate from its words (a `Wording`). A hard negative is a
changed claim in the same wording, known to be false because the claim is checked against the scene.
"""

import functools
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from random import Random

from cap_pretrain.data.scenes.world import (
    COLOURS,
    OPPOSITE,
    SHAPES,
    Pair,
    Scene,
    Thing,
    choose,
    clear_relation,
    relation_holds,
    shuffled,
)

CAPTIONS_PER_IMAGE = 5

# Concept -> words, the plain word first. Each word has one concept, so captions can be parsed.
_WORDS = {
    "red": ("red", "crimson"),
    "blue": ("blue", "cobalt"),
    "green": ("green", "emerald"),
    "yellow": ("yellow", "golden"),
    "purple": ("purple", "violet"),
    "orange": ("orange", "tangerine"),
    "pink": ("pink", "rose"),
    "cyan": ("cyan", "turquoise"),
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle", "pyramid"),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "heart": ("heart",),
    "ring": ("ring", "hoop"),
    "diamond": ("diamond", "rhombus"),
    "small": ("small", "little", "tiny"),
    "big": ("big", "large"),
    "solid": ("solid", "plain"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
    "dark": ("dark", "dim"),
    "light": ("light", "bright"),
    "thing": ("shape", "object"),
}
# Opposites have their forms in the same order, so reversing a relation changes no other word.
_RELATION_FORMS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_LEADS = ("", "there is ", "a picture of ", "an image of ", "we see ", "a drawing of ", "here is ")
# The leads that can precede a noun in singular or plural.
LABEL_TEMPLATES = tuple(f"{lead}{{}}" for lead in _LEADS if " is " not in lead)
_NUMBERS = ("no", "one", "two", "three")

_COLOUR_OF = {word: c for c in COLOURS for word in _WORDS[c]}
_SHAPE_OF = {word: s for s in SHAPES for word in _WORDS[s]}
_MODIFIERS = {
    w for c in ("small", "big", "solid", "striped", "dotted", "checkered") for w in _WORDS[c]
}


@dataclass(frozen=True, slots=True)
class Phrase:
    """The description of one object. An attribute that is None is not mentioned."""

    colour: str | None
    shape: str | None
    size: str | None = None
    pattern: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Return whether this describes `thing`. A size is wrong only if the opposite applies."""
        return (
            self.colour in (None, thing.colour)
            and self.shape in (None, thing.shape)
            and self.pattern in (None, thing.pattern)
            and (self.size is None or thing.size in (None, self.size))
        )


@dataclass(frozen=True, slots=True)
class Claim:
    """The content of a caption: phrases that describe objects, and what is said of the scene.

    It has a count of all objects or a relation, the position of the first object relative to the
    second, not both. `background` is the brightness of the background.
    """

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    count: int | None = None
    background: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Return whether the claim is true for any assignment of its phrases to objects."""
        if self.count not in (None, len(scene.things)):
            return False
        if self.background not in (None, scene.background.brightness):
            return False
        return any(
            all(phrase.fits(thing) for phrase, thing in zip(self.phrases, things, strict=True))
            and (not self.relation or relation_holds(things[0], self.relation, things[1]))
            for things in permutations(scene.things, len(self.phrases))
        )


class Wording:
    """A choice of words, with or without synonyms, the same in all captions written with it."""

    def __init__(self, rng: Random, synonyms: bool) -> None:
        self._rng = rng
        self._synonyms = synonyms
        self._chosen: dict[str, float] = {}

    def pick(self, choice: str, forms: Sequence[str]) -> str:
        """Return one of `forms`, the same (by position) each time for the same `choice`."""
        if choice not in self._chosen:
            self._chosen[choice] = self._rng.random()
        return forms[int(self._chosen[choice] * len(forms))]

    def word(self, concept: str) -> str:
        """Return a word for the concept, in most cases the plain one."""
        words = _WORDS[concept]
        if not self._synonyms or len(words) == 1:
            return words[0]
        return self.pick(concept, (words[0],) * len(words) + words[1:])

    def caption(self, claim: Claim, lead: str | None = None) -> str:
        """Return the claim in words after `lead`, one of `_LEADS`, which is drawn if None."""
        lead = self.pick("lead", _LEADS) if lead is None else lead
        text = self._body(claim, sentence=not lead)
        if claim.count and claim.count > 1:
            lead = lead.replace(" is ", " are ")
        if claim.background:
            text += f" on a {self.word(claim.background)} background"
        return lead + text

    def _body(self, claim: Claim, sentence: bool) -> str:
        names = [self.noun(p.colour, p.shape, p.size, p.pattern) for p in claim.phrases]
        if claim.count:
            number = f"{_NUMBERS[claim.count]} {self.word('thing')}{'s' * (claim.count > 1)}"
            return f"{number}: {_listed(names)}" if names else number
        if not claim.relation:
            return _listed(names)
        first, second, *others = names
        relation = self.relation(claim.relation)
        text = f"{first} {relation} {second}"
        if sentence:
            sentences = (f"{first} is {relation} {second}", f"{relation} {second} is {first}")
            text = self.pick("order", (text, *sentences))
        for name in others:
            text += f", {self.pick('too', ('and', 'with'))} {name}"
        return text

    def relation(self, relation: str) -> str:
        """Return words for a relation, one of `OPPOSITE`."""
        return self.pick("relation", _RELATION_FORMS[relation])

    def noun(
        self,
        colour: str | None,
        shape: str | None,
        size: str | None = None,
        pattern: str | None = None,
    ) -> str:
        """Return an object with its article, in words; an attribute that is None is left out."""
        concepts = (size, pattern, colour, shape or "thing")
        if not self._synonyms:
            return _plain_noun(concepts)
        return _with_article([self.word(concept) for concept in concepts if concept])


@functools.cache
def _plain_noun(concepts: tuple[str | None, ...]) -> str:
    return _with_article([_WORDS[concept][0] for concept in concepts if concept])


def _with_article(words: list[str]) -> str:
    return f"{'an' if words[0][0] in 'aeio' else 'a'} {' '.join(words)}"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def captions(
    scene: Scene, rng: Random, *, plain: bool, partial: bool, relations: bool, synonyms: bool
) -> list[str]:
    """Return five true captions that differ in lead, order, details and words.

    With `plain`, they only list each object's color and shape ("a red circle and a blue ring").
    Then only the order varies (and the words, with `synonyms`), so captions may be equal. With
    `partial`, about two in five leave something out, as people do; otherwise, each names every
    object's color and shape. With `relations`, some state the relative position of objects.
    """
    written = []
    for lead in shuffled(rng, _LEADS)[:CAPTIONS_PER_IMAGE]:  # different leads, so captions differ
        if plain:
            wording, things = Wording(rng, synonyms), shuffled(rng, scene.things)
            written.append(_listed([wording.noun(thing.colour, thing.shape) for thing in things]))
            continue
        claim = _partial_claim(scene, rng) if partial and rng.random() < 0.4 else None
        claim = claim or _full_claim(scene, rng, relations and rng.random() < 0.6)
        written.append(Wording(rng, synonyms).caption(claim, lead))
    return written


def negatives(
    scene: Scene,
    rng: Random,
    *,
    pairs: Collection[Pair],
    counts: Collection[int],
    plain: bool,
    relations: bool,
    synonyms: bool,
) -> dict[str, tuple[str, str]]:
    """Return pairs of a true caption and a false one with a minimal change: kind -> (true, false).

    `colour_replaced` and `shape_replaced` change one object; `attributes_swapped` swaps the colors
    of two objects; `relation_reversed` exchanges left and right or above and below;
    `objects_exchanged` swaps the two sides of the relation; `count_changed` changes a caption that
    only states the number of objects. Kinds that do not apply are left out.

    False captions mention only the given `pairs` of color and shape and `counts` of objects:
    others, which never occur in training, would make them easy to recognize. The further options
    are those of `captions`; without `relations` there are no negatives of relations.
    """
    if plain:
        phrases = (Phrase(thing.colour, thing.shape) for thing in shuffled(rng, scene.things))
        claim = Claim(tuple(phrases))
    else:
        claim = _full_claim(scene, rng, relations)
    changed = {
        "colour_replaced": (claim, _replacements(claim, "colour", COLOURS, rng)),
        "shape_replaced": (claim, _replacements(claim, "shape", SHAPES, rng)),
    }
    if len(claim.phrases) > 1:
        a, b, *others = claim.phrases
        swapped = (replace(a, colour=b.colour), replace(b, colour=a.colour), *others)
        changed["attributes_swapped"] = (claim, [replace(claim, phrases=swapped)])
    if claim.relation:
        reverse = replace(claim, relation=OPPOSITE[claim.relation])
        changed["relation_reversed"] = (claim, [reverse])
        changed["objects_exchanged"] = (claim, [replace(claim, phrases=(b, a, *others))])
    if not plain:
        miscounts = [Claim((), count=count) for count in shuffled(rng, sorted(counts))]
        changed["count_changed"] = (Claim((), count=len(scene.things)), miscounts)

    found = {}
    wording, lead = Wording(rng, synonyms), "" if plain else None
    for kind, (true, candidates) in changed.items():
        for false in candidates:
            allowed = all((p.colour, p.shape) in pairs for p in false.phrases)
            if allowed and not false.holds(scene):
                found[kind] = (wording.caption(true, lead), wording.caption(false, lead))
                break
    return found


def label_caption(label: str, name: str) -> str:
    """Return a caption that states only the class `name` of a kind of label."""
    if label == "relation" and name in OPPOSITE:
        return f"a big shape {_RELATION_FORMS[name][0]} a small shape"
    if label in ("relation", "count"):  # without a relation there is one object
        claim = Claim((), count=1 if name == "none" else int(name))
    else:
        claim = Claim((Phrase(None, name) if label == "shape" else Phrase(name, None),))
    return Wording(Random(0), synonyms=False).caption(claim, lead="")


@dataclass(frozen=True, slots=True)
class Mention:
    """An object in a caption, and where its words start; None for what is not mentioned."""

    colour: str | None = None
    shape: str | None = None
    colour_at: int | None = None
    shape_at: int | None = None

    def fits(self, thing: Thing) -> bool:
        """Return whether this mention describes `thing`."""
        return Phrase(self.colour, self.shape).fits(thing)


def find_mentions(caption: str) -> list[Mention]:
    """Return the objects that a caption mentions, in order.

    Synonyms are understood; case and punctuation are ignored. A color belongs to the next shape if
    only words for size and pattern are in between.
    """
    found: list[Mention] = []
    coloured = Mention()  # a color whose shape has not been found yet
    for match in re.finditer(r"[^\W\d_]+|$", caption.lower()):
        word, at = match[0], match.start()
        if word in _SHAPE_OF or word in _WORDS["thing"]:
            shape = _SHAPE_OF.get(word)
            found.append(replace(coloured, shape=shape, shape_at=at if shape else None))
            coloured = Mention()
        elif word not in _MODIFIERS:
            if coloured.colour:
                found.append(coloured)
            coloured = Mention()
            if word in _COLOUR_OF:
                coloured = Mention(_COLOUR_OF[word], colour_at=at)
    return found


def mentions(caption: str) -> list[tuple[str | None, str | None]]:
    """Return (color, shape) of each object that a caption mentions (see `find_mentions`)."""
    return [(mention.colour, mention.shape) for mention in find_mentions(caption)]


def names_every_object(scene: Scene, caption: str) -> bool:
    """Return whether the caption names each object's color and shape once, and no other object."""
    return Counter(mentions(caption)) == Counter(scene.pairs)


def _full_claim(scene: Scene, rng: Random, related: bool) -> Claim:
    things = shuffled(rng, scene.things)
    relation = None
    if related and len(things) > 1:
        relation = clear_relation(things[0], things[1])
        if not relation:  # the two largest are never diagonal: name them first
            first = shuffled(rng, scene.things[:2])
            things = first + [thing for thing in things if thing not in first]
            relation = clear_relation(things[0], things[1])
    count = len(things) if len(things) > 1 and not relation and rng.random() < 0.2 else None
    background = scene.background.brightness if rng.random() < 0.15 else None
    return Claim(tuple(describe(t, rng) for t in things), relation, count, background)


def _partial_claim(scene: Scene, rng: Random) -> Claim:
    """Return a claim with only the count, or without some objects, all colors, or all shapes."""
    things = shuffled(rng, scene.things)
    omit = choose(rng, ("names", "objects", "objects", "colours", "shapes"))
    if omit == "names":
        return Claim((), count=len(things))
    if omit == "objects" and len(things) > 1:
        kept = things[: 1 + int(rng.random() * (len(things) - 1))]
        return Claim(tuple(describe(thing, rng) for thing in kept))
    unsaid = {"shape": None} if omit == "shapes" else {"colour": None}
    return Claim(tuple(replace(describe(thing, rng), **unsaid) for thing in things))


def describe(thing: Thing, rng: Random) -> Phrase:
    """Return a phrase with the color and shape of an object, and perhaps its size and pattern."""
    size = thing.size if rng.random() < 0.3 else None
    pattern = thing.pattern if rng.random() < (0.1 if thing.pattern == "solid" else 0.4) else None
    return Phrase(thing.colour, thing.shape, size, pattern)


def _replacements(claim: Claim, attribute: str, values: Sequence[str], rng: Random) -> list[Claim]:
    """Return every claim in which one object's color or shape is replaced, in random order."""
    changed = []
    for k, phrase in enumerate(claim.phrases):
        for value in values:
            if value != getattr(phrase, attribute):
                other = replace(phrase, **{attribute: value})
                phrases = (*claim.phrases[:k], other, *claim.phrases[k + 1 :])
                changed.append(replace(claim, phrases=phrases))
    return shuffled(rng, changed)
