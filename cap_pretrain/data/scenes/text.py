"""Captions of scenes: writing true ones, writing false ones, and judging anybody's.

What a caption says (a `Claim`) is apart from how it says it (a `Wording`). So a hard negative is
the same wording of a changed claim, and is known to be false because the claim is checked against
the scene, not the words.
"""

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

# The plain word first. A word belongs to one concept only, or no judge could read it.
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
# Opposite relations have as many forms, in the same order, so reversing one changes no other word.
_RELATION_FORMS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_LEADS = ("", "there is ", "a picture of ", "an image of ", "we see ", "a drawing of ", "here is ")
# Where any noun may follow, of whatever number.
LABEL_TEMPLATES = tuple(f"{lead}{{}}" for lead in _LEADS if " is " not in lead)
_NUMBERS = ("no", "one", "two", "three")

_COLOUR_OF = {word: c for c in COLOURS for word in _WORDS[c]}
_SHAPE_OF = {word: s for s in SHAPES for word in _WORDS[s]}
_MODIFIERS = {
    w for c in ("small", "big", "solid", "striped", "dotted", "checkered") for w in _WORDS[c]
}


@dataclass(frozen=True, slots=True)
class Phrase:
    """What is said of one object; None is left unsaid."""

    colour: str | None
    shape: str | None
    size: str | None = None
    pattern: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether it may be said of `thing`. A size is only wrong when the opposite is right."""
        return (
            self.colour in (None, thing.colour)
            and self.shape in (None, thing.shape)
            and self.pattern in (None, thing.pattern)
            and (self.size is None or thing.size in (None, self.size))
        )


@dataclass(frozen=True, slots=True)
class Claim:
    """What a caption says: objects, how the first lies to the second, their number, the ground.

    A claim has a relation or a count, not both.
    """

    phrases: tuple[Phrase, ...]
    relation: str | None = None
    count: int | None = None
    background: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether the claim is true of the scene, in the reading most favourable to it."""
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
    """A way of saying things: asked again for the same choice, it chooses the same."""

    def __init__(self, rng: Random, synonyms: bool) -> None:
        self._rng = rng
        self._synonyms = synonyms
        self._chosen: dict[str, float] = {}

    def pick(self, choice: str, forms: Sequence[str]) -> str:
        if choice not in self._chosen:
            self._chosen[choice] = self._rng.random()
        return forms[int(self._chosen[choice] * len(forms))]

    def word(self, concept: str) -> str:
        """A word for the concept; the plain one more often than not."""
        words = _WORDS[concept]
        if not self._synonyms or len(words) == 1:
            return words[0]
        return self.pick(concept, (words[0],) * len(words) + words[1:])

    def caption(self, claim: Claim, lead: str | None = None) -> str:
        """The claim in words, opened by `lead` (one of `_LEADS`; drawn when None)."""
        lead = self.pick("lead", _LEADS) if lead is None else lead
        text = self._body(claim, sentence=not lead)
        if claim.count and claim.count > 1:
            lead = lead.replace(" is ", " are ")
        if claim.background:
            text += f" on a {self.word(claim.background)} background"
        return lead + text

    def _body(self, claim: Claim, sentence: bool) -> str:
        names = [self._noun(phrase) for phrase in claim.phrases]
        if claim.count:
            number = f"{_NUMBERS[claim.count]} {self.word('thing')}{'s' * (claim.count > 1)}"
            return f"{number}: {_listed(names)}" if names else number
        if not claim.relation:
            return _listed(names)
        first, second, *others = names
        relation = self.pick("relation", _RELATION_FORMS[claim.relation])
        text = f"{first} {relation} {second}"
        if sentence:
            sentences = (f"{first} is {relation} {second}", f"{relation} {second} is {first}")
            text = self.pick("order", (text, *sentences))
        for name in others:
            text += f", {self.pick('too', ('and', 'with'))} {name}"
        return text

    def _noun(self, phrase: Phrase) -> str:
        concepts = (phrase.size, phrase.pattern, phrase.colour, phrase.shape or "thing")
        words = [self.word(concept) for concept in concepts if concept]
        return f"{'an' if words[0][0] in 'aeio' else 'a'} {' '.join(words)}"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def captions(
    scene: Scene, rng: Random, *, plain: bool, partial: bool, relations: bool, synonyms: bool
) -> list[str]:
    """Five different true captions: different openings, order, details and words.

    Args:
        scene: what to describe.
        rng: where all choices come from.
        plain: say nothing but each object's colour and shape, as "a red circle and a blue ring";
            only the order varies (and words, with `synonyms`), so captions may be the same.
        partial: let about two in five leave something out, as people do; otherwise each names
            every object's colour and shape.
        relations: let some say how objects lie to each other.
        synonyms: use more than one word for the same thing.
    """
    told = []
    for lead in shuffled(rng, _LEADS)[:CAPTIONS_PER_IMAGE]:  # no two captions can be the same
        if plain:
            phrases = (Phrase(thing.colour, thing.shape) for thing in shuffled(rng, scene.things))
            told.append(Wording(rng, synonyms).caption(Claim(tuple(phrases)), lead=""))
            continue
        claim = _partial_claim(scene, rng) if partial and rng.random() < 0.4 else None
        claim = claim or _full_claim(scene, rng, relations and rng.random() < 0.6)
        told.append(Wording(rng, synonyms).caption(claim, lead))
    return told


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
    """Pairs of a true caption and a false one that differs as little as the kind allows.

    Args:
        scene: what the captions are about.
        rng: where all choices come from.
        pairs: the colour-shape pairs that a false caption may mention, lest one never seen in
            training give it away.
        counts: likewise, the numbers of objects.
        plain: say nothing but each object's colour and shape, as `captions` does.
        relations: whether captions speak of relations; without, there are no negatives of them.
        synonyms: use more than one word for the same thing.

    Returns:
        kind -> (true, false), kinds that do not apply left out. `colour_replaced` and
        `shape_replaced`: of one object; `attributes_swapped`: the colours of two objects;
        `relation_reversed`: left for right, above for below; `objects_exchanged`: the two sides of
        the relation; `count_changed`: of a caption that says no more than how many there are.
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
            usual = all((p.colour, p.shape) in pairs for p in false.phrases)
            if usual and not false.holds(scene):
                found[kind] = (wording.caption(true, lead), wording.caption(false, lead))
                break
    return found


def label_caption(labelling: str, name: str) -> str:
    """What a caption says of a scene whose label under a labelling is `name`, and no more."""
    if labelling == "relation" and name in OPPOSITE:
        return f"a big shape {_RELATION_FORMS[name][0]} a small shape"
    if labelling in ("relation", "count"):  # no relation, as there is but one
        claim = Claim((), count=1 if name == "none" else int(name))
    else:
        claim = Claim((Phrase(None, name) if labelling == "shape" else Phrase(name, None),))
    return Wording(Random(0), synonyms=False).caption(claim, lead="")


@dataclass(frozen=True, slots=True)
class Mention:
    """An object that a caption names; None is left unsaid.

    `colour_at` and `shape_at` are where these words begin in the caption.
    """

    colour: str | None = None
    shape: str | None = None
    colour_at: int | None = None
    shape_at: int | None = None

    def fits(self, thing: Thing) -> bool:
        """Whether it may be `thing` that is named."""
        return Phrase(self.colour, self.shape).fits(thing)


def find_mentions(caption: str) -> list[Mention]:
    """The objects a caption names, in order.

    Synonyms are understood, upper case and punctuation ignored. A colour belongs to the shape
    after it, with nothing but words for size and pattern in between.
    """
    found: list[Mention] = []
    coloured = Mention()  # as yet without a shape
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
    """The (colour, shape) of each object a caption names: see `find_mentions`."""
    return [(mention.colour, mention.shape) for mention in find_mentions(caption)]


def names_every_object(scene: Scene, caption: str) -> bool:
    """Whether the caption names each object's colour and shape, each once, and nothing else."""
    return Counter(mentions(caption)) == Counter(scene.pairs)


def _full_claim(scene: Scene, rng: Random, related: bool) -> Claim:
    things = shuffled(rng, scene.things)
    relation = None
    if related and len(things) > 1:
        relation = clear_relation(things[0], things[1])
        if not relation:  # the two largest never lie diagonally: name them first
            first = shuffled(rng, scene.things[:2])
            things = first + [thing for thing in things if thing not in first]
            relation = clear_relation(things[0], things[1])
    count = len(things) if len(things) > 1 and not relation and rng.random() < 0.2 else None
    background = scene.background.brightness if rng.random() < 0.15 else None
    return Claim(tuple(_describe(t, rng) for t in things), relation, count, background)


def _partial_claim(scene: Scene, rng: Random) -> Claim:
    """Says how many, or leaves out objects, or everybody's colour, or everybody's shape."""
    things = shuffled(rng, scene.things)
    omit = choose(rng, ("names", "objects", "objects", "colours", "shapes"))
    if omit == "names":
        return Claim((), count=len(things))
    if omit == "objects" and len(things) > 1:
        kept = things[: 1 + int(rng.random() * (len(things) - 1))]
        return Claim(tuple(_describe(thing, rng) for thing in kept))
    unsaid = {"shape": None} if omit == "shapes" else {"colour": None}
    return Claim(tuple(replace(_describe(thing, rng), **unsaid) for thing in things))


def _describe(thing: Thing, rng: Random) -> Phrase:
    size = thing.size if rng.random() < 0.3 else None
    pattern = thing.pattern if rng.random() < (0.1 if thing.pattern == "solid" else 0.4) else None
    return Phrase(thing.colour, thing.shape, size, pattern)


def _replacements(claim: Claim, attribute: str, values: Sequence[str], rng: Random) -> list[Claim]:
    """The claim with the colour or the shape of one object exchanged, in every way, shuffled."""
    changed = []
    for k, phrase in enumerate(claim.phrases):
        for value in values:
            if value != getattr(phrase, attribute):
                other = replace(phrase, **{attribute: value})
                phrases = (*claim.phrases[:k], other, *claim.phrases[k + 1 :])
                changed.append(replace(claim, phrases=phrases))
    return shuffled(rng, changed)
