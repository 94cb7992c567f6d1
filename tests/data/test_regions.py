"""Regions: the boxes and expressions of scenes, what becomes of malformed boxes, and batches."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cap_pretrain import inputs
from cap_pretrain.data import pipeline, regions
from cap_pretrain.data.builders.formats.located import in_shares, usable
from cap_pretrain.data.builders.regions import region_features
from cap_pretrain.data.requirements import check_reads, check_regions, has_regions
from cap_pretrain.data.scenes.render import render
from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.scenes.text import Phrase, find_mentions
from cap_pretrain.data.scenes.world import PLAIN, SHAPES, relation_holds
from cap_pretrain.data.sources import subset
from cap_pretrain.data.sources.layout import find_fields
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer, source_captions
from cap_pretrain.data.views import View
from cap_pretrain.errors import UserError
from cap_pretrain.learners import objectives
from cap_pretrain.validation import validate
from tests import toy

READS = ("image", "text", "prompt", "phrases", "boxes")
ODD = (math.nan, math.inf, -math.inf, -0.0, 1e308, 5e-324, 10**400, -(10**400), None, "1", True)
SIDES = {
    "left of": "left",
    "right of": "right",
    **dict.fromkeys(("above", "over"), "above"),
    **dict.fromkeys(("below", "under"), "below"),
}

# Scenes


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_are_those_of_the_pixels(shape):
    size, source, checked = 256, Scenes("train"), 0
    for i in range(60):
        scene = source.scene(i)
        for thing, (_, box) in zip(scene.things, source.regions(i), strict=True):
            if thing.shape != shape:
                continue
            alone = replace(scene, things=(replace(thing, pattern="solid"),), background=PLAIN)
            empty = replace(scene, things=(), background=PLAIN)
            drawn = render(alone, size, 0.0).astype(int) - render(empty, size, 0.0)
            rows, columns = np.nonzero(np.abs(drawn).max(-1) > 2)
            pixels = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert np.abs(np.array(pixels) - np.array(box) * size).max() <= 1.05
            assert min(box) >= 0 and max(box) <= 1
            checked += 1
    assert checked


def fitting(scene, expression):
    """The objects of a scene that an expression fits, as far as words say."""
    side = next((text for text in SIDES if f" {text} " in f" {expression} "), None)
    own, _, anchor = expression.partition(f" {side} ") if side else (expression, "", "")
    size = next((s for s in ("small", "big") if s in own), None)
    pattern = next((p for p in ("striped", "dotted", "checkered", "solid") if p in own), None)
    (mention,) = find_mentions(own.replace("solid ", "").replace(f"{size} ", ""))
    phrase = Phrase(mention.colour, mention.shape, size, pattern)
    found = [thing for thing in scene.things if phrase.fits(thing)]
    if not side:
        return found
    (mention,) = find_mentions(anchor)
    (other,) = [thing for thing in scene.things if mention.fits(thing)]
    return [t for t in found if t is not other and relation_holds(t, SIDES[side], other)]


def test_expressions_fit_exactly_one_object():
    source, kinds = Scenes("train", synonyms=False), Counter()
    for i in range(400):
        scene = source.scene(i)
        expressions = source.regions(i)
        assert expressions == source.regions(i) and len(expressions) == len(scene.things)
        for thing, (expression, _) in zip(scene.things, expressions, strict=True):
            assert fitting(scene, expression) == [thing], expression
            mention = find_mentions(expression)[0]
            kinds["relation"] += any(f" {side} " in expression for side in SIDES)
            kinds["short"] += None in (mention.colour, mention.shape)
    assert min(kinds.values()) > 50
    plain = Scenes("train", plain_captions=True)
    scene, found = plain.scene(3), plain.regions(3)
    assert [p.split()[0] for p, _ in found] == ["the"] * len(scene.things)
    assert [
        find_mentions(phrase)[0].fits(t) for t, (phrase, _) in zip(scene.things, found, strict=True)
    ]


# Malformed boxes


def test_boxes_are_cut_to_the_image_or_left_out():
    rng = random.Random(0)
    kept = 0
    for _ in range(3000):
        count = 4 if rng.random() < 0.9 else rng.randrange(7)
        values = [
            rng.choice(ODD) if rng.random() < 0.1 else rng.uniform(-1, 2) for _ in range(count)
        ]
        for box in (regions.checked_box(values), in_shares(values, 0.7, 1.5)):
            if box is not None:
                kept += 1
                assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
                assert all(type(side) is float and math.isfinite(side) for side in box)
    assert kept > 500


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([10, 20, 30, 40], (0.1, 0.1, 0.4, 0.3)),
        ([-10, -20, 30, 40], (0.0, 0.0, 0.2, 0.1)),  # cut
        ([90, 190, 30, 40], (0.9, 0.95, 1.0, 1.0)),
        ([100, 20, 30, 40], None),  # beyond the image
        ([10, 20, 0, 40], None),
        ([10, 20, -3, 40], None),
        ([math.nan, 20, 3, 40], None),
        ([10, 20, math.inf, 40], None),
        ([10, 20, 30], None),
        (["1", 20, 30, 40], None),
        ([True, 20, 30, 40], None),
        ([10**400, 20, 30, 40], None),
        ({"x": 1}, None),
        (None, None),
    ],
)
def test_boxes_in_pixels(box, expected):
    found = in_shares(box, 100, 200)
    assert found == (pytest.approx(expected) if expected else None)
    wanted = ([("a dog", found)], []) if expected else ([], ["box not valid"])
    assert usable([(" a dog ", found)]) == wanted


def test_regions_that_cannot_be_used_are_counted():
    box = (0.0, 0.0, 1.0, 1.0)
    found = [("a", box), ("  ", box), (3, box), (["a", "b"], box), ("x" * 20_001, box), ("b", None)]
    kept, dropped = usable([*found, *[("c", box)] * 1001])
    assert len(kept) == 1000 and kept[0] == ("a", box)
    assert Counter(dropped) == {
        "region without phrase": 3,
        "phrase too long": 1,
        "box not valid": 1,
        "more than 1000 regions": 2,
    }


# Batches


@pytest.fixture
def tokenizer(tokenizer_path):
    return SentencePieceTokenizer(tokenizer_path, 16)


class Captioned:
    """Captioned images without regions, but every third example has a stored one."""

    class_names = []

    def __init__(self, every=3):
        self._scenes, self._every = Scenes("val", 16), every

    def __len__(self):
        return 12

    def __getitem__(self, index):
        own = [("a dog", (0.25, 0.5, 0.75, 1.0))] if index % self._every == 0 else []
        return self._scenes[index] | {"regions": own}


def test_rows_draw_different_regions_by_their_number(tokenizer):
    source = Scenes("train", 16, min_objects=3, length_train=40)
    options = pipeline.ImageOptions(16, regions=2)
    batches = pipeline.train_dataset([(source, 1.0)], tokenizer, options, batch_size=20, seed=1)
    plain = pipeline.train_dataset(
        [(source, 1.0)], tokenizer, pipeline.ImageOptions(16), batch_size=20, seed=1
    )
    orders = Counter()
    for t in (0, 3):
        batch, again = batches[t], batches[t]
        assert batch["phrases"].shape == (20, 2, 16) and batch["boxes"].dtype == np.float32
        toy.assert_same(batch, again)
        toy.assert_same({name: batch[name] for name in plain[t]}, plain[t])  # drawn as without
        for row in range(20):
            own = source.regions(int(batch["index"][row]))
            ids = [tokenizer.encode(phrase).tolist() for phrase, _ in own]
            which = [ids.index(p) for p in batch["phrases"][row].tolist()]
            assert len(set(which)) == 2
            assert np.allclose(batch["boxes"][row], [own[i][1] for i in which])
            orders[tuple(which)] += 1
    assert len(orders) == 6


def test_images_without_regions_have_padding(tokenizer):
    source = Captioned()
    options = pipeline.ImageOptions(16, regions=2)
    batch = pipeline.train_dataset([(source, 1.0)], tokenizer, options, batch_size=12, seed=0)[0]
    has = batch["index"] % 3 == 0
    assert np.array_equal(batch["phrases"].any((1, 2)), has)
    assert not batch["phrases"][:, 1].any() and not batch["boxes"][~has].any()
    assert batch["boxes"][has, 0].tolist() == [[0.25, 0.5, 0.75, 1.0]] * 4
    last = pipeline.eval_batches(source, tokenizer, view=View(16), batch_size=8, regions=1)[1]
    assert last["phrases"].any((1, 2)).tolist() == [False, True, False, False] + [False] * 4
    bad = pipeline.ImageOptions(16, flip=True, regions=1)
    with pytest.raises(UserError, match="data.flip: True"):
        pipeline.train_dataset([(source, 1.0)], tokenizer, bad, batch_size=2, seed=0)


def test_sources_say_whether_they_have_regions():
    scenes, none = Scenes("val", 16), Captioned(every=10**9)
    part = subset.sample(scenes, 20, seed=0)
    assert part.regions(3) in [scenes.regions(i) for i in range(len(scenes))]
    assert has_regions(part) and has_regions(Captioned(every=11))
    assert not has_regions(subset.Subset(none, np.array([1, 2]), "some"))
    check_regions([none, scenes], READS)
    check_reads(none, READS, "{}")
    with pytest.raises(UserError, match="has no regions"):
        check_regions([subset.Subset(none, np.array([1, 2]), "some")], READS)


def test_each_part_of_a_joint_learner_has_what_it_reads(monkeypatch):
    class Wordless(Scenes):
        def without_image(self, index):
            return super().without_image(index) | {"captions": []}

    monkeypatch.setattr(inputs, "open_data", lambda *_: Wordless("val", 16))
    locca, both = toy.config("locca"), toy.config()
    both.learner = objectives.section("locca+siglip")
    assert inputs.open_sources(locca)
    with pytest.raises(UserError, match="has no text, which the learner joint needs"):
        inputs.open_sources(both)


def test_features_of_other_types_hold_no_regions():
    features = tfds.features
    rows = {"phrases": features.Text(), "boxes": features.BBoxFeature()}
    for own in (
        {"phrases": features.Sequence(features.Text()), "boxes": features.Sequence(rows["boxes"])},
        {"phrases": features.Sequence(np.int64), "boxes": features.Sequence(np.float32)},
        {"phrases": features.Text(), "boxes": features.Sequence(np.float32)},
        rows,
        {"phrases": features.Sequence(rows), "boxes": features.Sequence(np.float32)},
    ):
        assert not find_fields({"image": features.Image(), **own}, {}, "d").has_regions
    assert find_fields({"image": features.Image(), **region_features()}, {}, "d").has_regions


def test_phrases_are_text_of_a_source():
    scenes = Scenes("val", 16)
    phrases = {phrase for phrase, _ in scenes.regions(0)}
    assert phrases < set(source_captions(scenes, 20, regions=True))
    assert phrases.isdisjoint(source_captions(scenes, 20))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__crop": "random"}, "data.crop: 'random' moves"),
        ({"data__flip": True}, "data.flip: True moves"),
        ({"data__buckets": True}, "data.buckets: has no regions"),
        ({"data__regions": 0}, "data.regions: 0 must be at least 1"),
    ],
)
def test_what_moves_regions_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        validate(toy.config("locca", **fields))
