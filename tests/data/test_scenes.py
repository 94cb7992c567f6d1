"""The dataset `scenes`: deterministic examples, disjoint splits, labels and options."""

import hashlib
import pickle
import re
import subprocess
import sys
from itertools import pairwise, permutations

import numpy as np
import pytest

from cap_pretrain.data.scenes.source import LABELS, SPLITS, Scenes, ScenesOptions
from cap_pretrain.data.scenes.text import mentions, names_every_object
from cap_pretrain.data.scenes.world import COLOURS, HELD_OUT, SHAPES
from cap_pretrain.errors import UserError


def assert_same_record(a: dict, b: dict) -> None:
    np.testing.assert_array_equal(a["image"], b["image"])
    assert {k: v for k, v in a.items() if k != "image"} == {
        k: v for k, v in b.items() if k != "image"
    }


def test_record_is_a_pure_function_of_split_index_and_options():
    source = Scenes("train", 32)
    first = source[7]
    source[8], source[123456]  # no matter what was read before
    assert_same_record(source[7], first)
    assert_same_record(pickle.loads(pickle.dumps(source))[np.int64(7)], first)
    program = (
        "import hashlib; from cap_pretrain.data.scenes.source import Scenes\n"
        "r = Scenes('train', 32)[7]; print(hashlib.sha1(r['image']).hexdigest(), r['captions'])"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert output.split()[0] == hashlib.sha1(first["image"]).hexdigest()
    assert str(first["captions"]) in output


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
    # Every color and every shape can be learned although some pairs are missing.
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
        assert all(a >= 1.19 * b for a, b in pairwise(radii))
        for t in things:
            assert t.radius <= t.x <= 1 - t.radius and t.radius <= t.y <= 1 - t.radius
        for a, b in permutations(things, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
    assert counts == {1, 2, 3}


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
    ("split", "options", "message"),
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
def test_bad_options_raise_with_a_suggestion(split, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Scenes(split, **options)


def test_every_option_is_documented():
    for name in ScenesOptions.__dataclass_fields__:
        assert f"{name}:" in ScenesOptions.__doc__


def test_options_of_easy_scenes():
    options = {"max_objects": 2, "smallest": 0.2, "backgrounds": False, "noise": 0.0}
    source = Scenes("train", 48, plain_captions=True, synonyms=False, **options)
    for index in range(20):
        scene, record = source.scene(index), source[index]
        assert min(thing.radius for thing in scene.things) >= 0.2
        assert np.all(record["image"][0, 0] == 128)  # no object reaches the corner
        for caption in record["captions"]:
            assert set(caption.split()) - set(COLOURS) - set(SHAPES) <= {"a", "an", "and"}
            assert names_every_object(scene, caption)


def test_objects_must_fit_into_the_image():
    with pytest.raises(UserError, match="smallest is 0.25; with 2 objects give 0.115 to 0.21"):
        Scenes("train", 48, max_objects=2, smallest=0.25)
