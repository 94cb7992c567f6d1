"""Captions of scenes are true, hard negatives are false, and both can be parsed."""

import re
from itertools import permutations

import pytest

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.scenes.text import mentions, names_every_object
from cap_pretrain.data.scenes.world import COLOURS, HELD_OUT, PATTERNS, SHAPES, Scene, Thing

MEANING = {
    **{word: ("colour", word) for word in COLOURS},
    **{word: ("shape", word) for word in SHAPES},
    **{word: ("pattern", word) for word in PATTERNS},
    "crimson": ("colour", "red"),
    "cobalt": ("colour", "blue"),
    "emerald": ("colour", "green"),
    "golden": ("colour", "yellow"),
    "violet": ("colour", "purple"),
    "tangerine": ("colour", "orange"),
    "rose": ("colour", "pink"),
    "turquoise": ("colour", "cyan"),
    "disc": ("shape", "circle"),
    "box": ("shape", "square"),
    "pyramid": ("shape", "triangle"),
    "plus": ("shape", "cross"),
    "hoop": ("shape", "ring"),
    "rhombus": ("shape", "diamond"),
    "small": ("size", "small"),
    "little": ("size", "small"),
    "tiny": ("size", "small"),
    "big": ("size", "big"),
    "large": ("size", "big"),
    "plain": ("pattern", "solid"),
    "stripy": ("pattern", "striped"),
    "spotted": ("pattern", "dotted"),
    "checked": ("pattern", "checkered"),
}
RELATIONS = {
    "to the left of": "left",
    "left of": "left",
    "to the right of": "right",
    "right of": "right",
    "above": "above",
    "over": "above",
    "below": "below",
    "under": "below",
}


def is_true(caption: str, scene: Scene) -> bool:
    """Check a caption with an independent parser."""
    text = re.sub(
        r"^(there (is|are)|here (is|are)|we see|(a|an) (picture|image|drawing) of) ", "", caption
    )
    if found := re.search(r" on a (dark|dim|light|bright) background$", text):
        level = scene.background.level
        if (found[1] in ("dark", "dim") and level > 90) or (
            found[1] in ("light", "bright") and level < 170
        ):
            return False
        text = text[: found.start()]
    if found := re.match(r"(one|two|three) (shape|object)s?(: |$)", text):
        if len(scene.things) != ("one", "two", "three").index(found[1]) + 1:
            return False
        text = text[found.end() :]
    relation = None
    for words, name in RELATIONS.items():
        if found := re.search(rf"(^|(?<= )){words} ", text):
            relation, inverted = name, found.start() == 0
            break
    nouns = [
        [MEANING[word] for word in re.findall("[a-z]+", noun) if word in MEANING]
        for noun in re.split(r"\ban? ", text)[1:]
    ]
    if relation and inverted:
        nouns[:2] = nouns[1::-1]

    def agrees(things: tuple[Thing, ...]) -> bool:
        for noun, thing in zip(nouns, things, strict=True):
            for kind, value in noun:
                if kind == "size":
                    if (value == "big") != (thing.radius > 0.157):
                        return False
                elif getattr(thing, kind) != value:
                    return False
        if not relation:
            return True
        (a, b), (axis, sign) = (
            things[:2],
            {
                "left": ("x", -1),
                "right": ("x", 1),
                "above": ("y", -1),
                "below": ("y", 1),
            }[relation],
        )
        return (getattr(a, axis) - getattr(b, axis)) * sign > 0

    return any(agrees(things) for things in permutations(scene.things, len(nouns)))


@pytest.mark.parametrize("split", ["train", "novel"])
@pytest.mark.parametrize("synonyms", [True, False])
def test_captions_are_true_and_short(split, synonyms):
    source = Scenes(split, 16, synonyms=synonyms)
    words, full, total = set(), 0, 0
    for i in range(300):
        scene = source.scene(i)
        for caption in source[i]["captions"]:
            assert is_true(caption, scene), (caption, scene)
            assert len(caption.split()) <= 25
            words |= set(re.findall("[a-z]+", caption))
            full += names_every_object(scene, caption)
            total += 1
    assert 0.5 < full / total < 0.75
    assert (60 if synonyms else 45) < len(words) < (100 if synonyms else 65)


def test_full_captions_name_every_object_and_options_are_obeyed():
    source = Scenes("train", 16, partial_captions=False, relations=False, synonyms=False)
    for i in range(200):
        for caption in source[i]["captions"]:
            assert names_every_object(source.scene(i), caption)
            assert not re.search(r"\b(left|right|above|over|below|under|crimson|disc)\b", caption)
        assert not {"relation_reversed", "objects_exchanged"} & set(source.negatives(i))


@pytest.mark.parametrize("split", ["train", "novel"])
def test_negatives_are_false_and_close_to_the_true_caption(split):
    source = Scenes(split, 16)
    seen: dict[str, int] = {}
    for i in range(300):
        scene = source.scene(i)
        negatives = source.negatives(i)
        assert negatives == source.negatives(i)
        for kind, (true, false) in negatives.items():
            seen[kind] = seen.get(kind, 0) + 1
            assert is_true(true, scene) and not is_true(false, scene), (kind, true, false, scene)
            was, now = (re.findall("[a-z]+", c) for c in (true, false))
            if kind == "count_changed":
                assert len(was) == len(now) and not set(was) & {*COLOURS, *SHAPES}
                continue
            assert names_every_object(scene, true)
            changed = [w for w, n in zip(was, now, strict=True) if w != n and n not in ("a", "an")]
            if kind in ("colour_replaced", "shape_replaced"):
                assert len(changed) == 1
                both = zip(mentions(true), mentions(false), strict=True)
                ((was, now),) = ((p, q) for p, q in both if p != q)
                assert was[kind == "colour_replaced"] == now[kind == "colour_replaced"]
            elif kind == "relation_reversed":
                assert len(changed) == 1 and sorted(mentions(true)) == sorted(mentions(false))
            else:
                plain = [sorted(w for w in c if w not in ("a", "an")) for c in (was, now)]
                assert plain[0] == plain[1]  # the same words in another order
            if split == "train":
                assert not set(mentions(false)) & HELD_OUT
    assert seen["colour_replaced"] == seen["shape_replaced"] == seen["count_changed"] == 300
    assert min(seen[k] for k in ("relation_reversed", "objects_exchanged")) > 150
    assert seen["attributes_swapped"] > 100


def _scene(*pairs: tuple[str, str]) -> Scene:
    background = Scenes("train").scene(0).background
    things = [Thing(c, s, "solid", 0.5, 0.5, 0.1, 0.0, (0, 0, 0)) for c, s in pairs]
    return Scene(tuple(things), background, 0.0, 0.0)


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("a red circle and a blue star", True),
        ("A cobalt star, and a crimson disc.", True),
        ("two shapes: a big dotted red circle and a small plain blue star on a dark ground", True),
        ("below a blue star is a red circle", True),
        ("a blue circle and a red star", False),
        ("a red circle", False),
        ("a red circle and a blue star and a green heart", False),
        ("a red circle, a red circle and a blue star", False),
        ("a red circle and a star", False),
        ("a red circle, a blue star and a square", False),
        ("a red circle, a blue star and a green object", False),
        ("a red shape and a blue shape", False),
        ("a red blue circle and a blue star", False),
        ("a red and blue circle, a star", False),
        ("a red circles and a blue star", False),
        ("two shapes", False),
        ("", False),
    ],
)
def test_names_every_object(caption, named):
    assert names_every_object(_scene(("red", "circle"), ("blue", "star")), caption) is named


def test_mentions_reads_synonyms_and_gaps():
    assert mentions("There is a tiny spotted VIOLET hoop, with a plus; an emerald object") == [
        ("purple", "ring"),
        (None, "cross"),
        ("green", None),
    ]
