"""Scenes: pure, as told, and told truly."""

import hashlib
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from cap_pretrain.data.scenes.render import render
from cap_pretrain.data.scenes.source import LABELS, SPLITS, Scenes, ScenesOptions
from cap_pretrain.data.scenes.text import mentions, names_every_object
from cap_pretrain.data.scenes.world import COLOURS, HELD_OUT, PATTERNS, SHAPES, Scene, Thing
from cap_pretrain.errors import UserError

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
    """Reads a caption with a grammar of its own and compares it with the scene."""
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


def assert_same_record(a: dict, b: dict) -> None:
    np.testing.assert_array_equal(a["image"], b["image"])
    assert {k: v for k, v in a.items() if k != "image"} == {
        k: v for k, v in b.items() if k != "image"
    }


def test_record_is_a_pure_function_of_split_index_and_options():
    source = Scenes("train", 32)
    first = source[7]
    source[8], source[123456]  # whatever was asked before
    assert_same_record(source[7], first)
    assert_same_record(pickle.loads(pickle.dumps(source))[np.int64(7)], first)
    program = (
        "import hashlib; from cap_pretrain.data.scenes.source import Scenes\n"
        "r = Scenes('train', 32)[7]; print(hashlib.sha1(r['image']).hexdigest(), r['captions'])"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert told.split()[0] == hashlib.sha1(first["image"]).hexdigest()
    assert str(first["captions"]) in told


def test_record_has_the_source_form():
    source = Scenes("val", 48, length_val=5)
    assert len(source) == 5 == len([*source])
    ids = set()
    for record in source:
        assert set(record) == {"image", "captions", "label", "id"}
        assert record["image"].shape == (48, 48, 3) and record["image"].dtype == np.uint8
        assert record["image"].flags.c_contiguous
        assert len(record["captions"]) == len(set(record["captions"])) == 5
        assert 0 <= record["label"] < len(source.class_names)
        ids.add(record["id"])
    assert len(ids) == 5
    for outside in (5, -1):
        with pytest.raises(IndexError):
            source[outside]


def test_captions_and_labels_do_not_change_the_picture():
    plain = Scenes("train", 32)
    other = Scenes("train", 32, synonyms=False, partial_captions=False, label="count")
    for i in range(20):
        np.testing.assert_array_equal(plain[i]["image"], other[i]["image"])


def test_splits_share_no_scene_and_novel_alone_shows_the_held_out_pairs():
    seen: dict[str, set] = {}
    places: dict[str, set] = {}
    for split in SPLITS:
        scenes = [Scenes(split).scene(i) for i in range(400)]
        seen[split] = {pair for scene in scenes for pair in scene.pairs}
        places[split] = {thing.x for scene in scenes for thing in scene.things}
    for split in ("train", "val", "test"):
        assert not seen[split] & HELD_OUT
        assert len(seen[split]) == len(COLOURS) * len(SHAPES) - len(HELD_OUT)
        assert not places[split] & places["novel"]
    assert seen["novel"] == HELD_OUT
    assert not places["train"] & places["val"] and not places["val"] & places["test"]
    # Every colour and every shape is learnable although some pairs are missing.
    assert {c for c, _ in seen["train"]} == set(COLOURS)
    assert {s for _, s in seen["train"]} == set(SHAPES)


@pytest.mark.parametrize("split", SPLITS)
def test_objects_are_apart_inside_distinct_and_the_main_one_is_largest(split):
    source = Scenes(split)
    counts = set()
    for i in range(300):
        things = source.scene(i).things
        counts.add(len(things))
        assert len({t.pair for t in things}) == len(things)
        radii = [t.radius for t in things]
        assert all(a >= 1.19 * b for a, b in zip(radii, radii[1:], strict=False))
        for t in things:
            assert t.radius <= t.x <= 1 - t.radius and t.radius <= t.y <= 1 - t.radius
        for a, b in permutations(things, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
    assert counts == {1, 2, 3}


def test_the_same_scene_at_every_size():
    differences, unlike = [], []
    for i in range(20):
        scene, other = Scenes("train").scene(i), Scenes("train").scene(i + 1)
        small = render(scene, 48, 0.0).astype(float)
        large = render(scene, 192, 0.0).reshape(48, 4, 48, 4, 3).mean((1, 3))
        differences.append(np.abs(small - large).mean())
        unlike.append(np.abs(small - render(other, 48, 0.0)).mean())
    assert max(differences) < 2.0
    assert min(unlike) > 4.0


def test_pixels_show_the_colour_at_the_place():
    rgb = {"red": (215, 35, 40), "blue": (35, 80, 215), "yellow": (245, 222, 45)}
    source = Scenes("train", 96, noise=0.0, patterns=False)
    checked = 0
    for i in range(150):
        record = source[i]["image"]
        for t in source.scene(i).things:
            if t.colour in rgb and t.shape != "ring":
                pixel = record[int(t.y * 96), int(t.x * 96)].astype(int)
                assert np.abs(pixel - rgb[t.colour]).max() <= 14
                checked += 1
    assert checked > 50


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_anti_aliased_and_whole(shape):
    source = Scenes("train", noise=0.0, patterns=False, max_objects=1)
    k = next(i for i in range(500) if source.scene(i).things[0].shape == shape)
    thing = source.scene(k).things[0]
    cover = _cover(source.scene(k), 64)
    assert 10 < ((cover > 0.2) & (cover < 0.8)).sum() < (cover >= 0.8).sum()
    ys, xs = np.nonzero(cover > 0.5)
    # Within its circle, filling most of one diameter: nothing is cut off, nothing is tiny.
    assert np.hypot(xs + 0.5 - thing.x * 64, ys + 0.5 - thing.y * 64).max() < thing.radius * 64 + 1
    assert max(np.ptp(xs), np.ptp(ys)) > 1.6 * thing.radius * 64 - 2
    box = np.abs(np.stack([xs + 0.5 - thing.x * 64, ys + 0.5 - thing.y * 64])).max()
    assert box < thing.radius * 64


def _cover(scene: Scene, size: int) -> np.ndarray:
    """How far each pixel [S, S] is from the background to the colour of the one object."""
    image = render(scene, size, 0.0).astype(float)
    ground = render(replace(scene, things=()), size, 0.0).astype(float)
    change = np.abs(image - ground).sum(-1)
    return change / np.quantile(change[change > 0], 0.8)


def test_patterns_and_noise_show():
    scene = Scenes("train", max_objects=1).scene(3)
    pictures = []
    for pattern in PATTERNS:
        marked = replace(scene, things=(replace(scene.things[0], pattern=pattern),), noise=1.0)
        pictures.append(render(marked, 64, 0.0).astype(float))
        grain = render(marked, 64, 0.05) - pictures[-1]
        assert 9 < grain.std() < 14  # 0.05 of 255 is 12.75, less where it is clipped
    for a, b in permutations(pictures, 2):
        assert (np.abs(a - b).max(-1) > 60).sum() > 10


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
                assert plain[0] == plain[1]  # the same words, elsewhere
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


@pytest.mark.parametrize("label", LABELS)
def test_labels_agree_with_the_scene(label):
    source = Scenes("test", 16, label=label)
    seen = set()
    for i in range(200):
        scene = source.scene(i)
        main = max(scene.things, key=lambda t: t.radius)
        relation = "none"
        if len(scene.things) > 1:
            _, second, *_ = sorted(scene.things, key=lambda t: -t.radius)
            dx, dy = main.x - second.x, main.y - second.y
            if abs(dx) > abs(dy):
                relation = "left" if dx < 0 else "right"
            else:
                relation = "above" if dy < 0 else "below"
        expected = {
            "shape": main.shape,
            "colour": main.colour,
            "count": str(len(scene.things)),
            "relation": relation,
        }
        assert scene.labels() == expected
        name = source.class_names[source[i]["label"]]
        assert name == expected[label]
        seen.add(name)
    assert seen == set(source.class_names)


def test_fewer_colours_shapes_objects():
    source = Scenes("train", 16, colours=3, shapes=2, min_objects=2, max_objects=2, patterns=False)
    pairs = {pair for i in range(100) for pair in source.scene(i).pairs}
    assert pairs == {(c, s) for c in COLOURS[:3] for s in SHAPES[:2]} - HELD_OUT
    assert source.label_classes["colour"] == list(COLOURS[:3])
    for i in range(100):
        assert len(source.scene(i).things) == 2
        assert all(t.pattern == "solid" for t in source.scene(i).things)
        for true_and_false in source.negatives(i).values():
            assert {c for text in true_and_false for c, _ in mentions(text)} <= set(COLOURS[:3])


@pytest.mark.parametrize(
    ("split", "options", "told"),
    [
        ("tran", {}, "'train'"),
        ("train", {"colors": 3}, "'colours'"),
        ("train", {"colours": 9}, "2 to 8"),
        ("train", {"shapes": 1}, "2 to 8"),
        ("train", {"noise": -0.1}, "0.0 to 0.5"),
        ("train", {"min_objects": 3, "max_objects": 2}, "max_objects"),
        ("train", {"label": "color"}, "'colour'"),
        ("train", {"colours": "many"}, "type int"),
        ("train", {"patterns": 1}, "type bool"),
        ("train", {"image_size": 4}, "16 pixels"),
        ("novel", {"colours": 2, "shapes": 2}, "held-out pairs"),
    ],
)
def test_mistakes_are_told_with_a_way_out(split, options, told):
    with pytest.raises(UserError, match=re.escape(told)):
        Scenes(split, **options)


def test_every_option_is_documented():
    for name in ScenesOptions.__dataclass_fields__:
        assert f"{name}:" in ScenesOptions.__doc__


def test_easier_scenes_are_as_their_options_say():
    options = {"max_objects": 2, "smallest": 0.2, "backgrounds": False, "noise": 0.0}
    source = Scenes("train", 48, plain_captions=True, synonyms=False, **options)
    for index in range(20):
        scene, record = source.scene(index), source[index]
        assert min(thing.radius for thing in scene.things) >= 0.2
        assert np.all(record["image"][0, 0] == 128)  # nothing reaches the corner
        for caption in record["captions"]:
            assert set(caption.split()) - set(COLOURS) - set(SHAPES) <= {"a", "an", "and"}
            assert names_every_object(scene, caption)


def test_objects_can_only_be_as_large_as_they_fit():
    with pytest.raises(UserError, match="smallest is 0.25; with 2 objects give 0.115 to 0.21"):
        Scenes("train", 48, max_objects=2, smallest=0.25)
