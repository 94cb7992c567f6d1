"""Tests of the rules that choose the settings of a small run."""

import dataclasses
import itertools

import numpy as np
import pytest

from cap_pretrain.errors import UserError
from cap_pretrain.optim import schedule
from cap_pretrain.small import config, rules
from cap_pretrain.small.rules import Devices, Facts
from cap_pretrain.validation import validate

SIZES = (200, 650, 1_900, 2_100, 19_000, 100_000)
DEVICES = tuple(Devices(*pair) for pair in (("cpu", 1), ("cpu", 12), ("gpu", 1)))


def facts(images=5_400, captions=5.0, **fields):
    """Return the facts of a dataset with captions of twelve words."""
    usual = dict(held_out=rules.held_out(images), words=round(12 * captions * images))
    usual |= dict(characters=60, tokens=22, side=375, sided=0.004)
    return Facts(images=images, captions=captions, **(usual | fields))


def resolved(found, devices=DEVICES[1], objective="cap"):
    return config.resolve("data/mine", objective, found, devices)[0]


def test_objectives_may_be_joined():
    c = resolved(facts(), objective="cappa+siglip")
    validate(c)
    assert {name: part.name for name, part in c.learner.parts.items()} == {
        "cappa": "captioner",
        "siglip": "dual_encoder",
    }
    assert c.learner.parts.cappa.parallel_fraction == rules.PARALLEL
    assert set(c.evals) == {"val", "samples", "retrieval"}
    assert c.batch_size == resolved(facts(), objective="cap").batch_size
    for objective, message in (
        ("cap+sigli", "objective: 'sigli' is none of cap, .*Did you mean 'siglip'"),
        ("cap+cap", "objective: 'cap.cap' names one twice"),
        ("", "objective: '' is none of"),
    ):
        with pytest.raises(UserError, match=message):
            config.check_objective(objective)


@pytest.mark.parametrize("objective", config.OBJECTIVES)
def test_settings_are_valid_and_sane_at_every_size(objective):
    for images, captions, devices in itertools.product(SIZES, (1.0, 5.0), DEVICES):
        c = resolved(facts(images, captions), devices, objective)
        validate(c)
        examples = c.total_steps * c.batch_size
        assert c.batch_size <= images / 4 and c.batch_size & (c.batch_size - 1) == 0
        assert 3 <= examples / (images * captions) <= 15 or examples >= 199_000
        assert 100 <= c.total_steps <= 50_000
        assert 32 <= c.data.image_size <= 224
        assert 512 <= c.text.vocab_size <= 32_768 and c.text.length == 24
        assert 5e-4 <= c.optim.lr <= 5e-3
        made = schedule.make_schedule(c, epoch=images)
        assert 1 <= made.warmup < made.total and made.evaluate * 10 >= made.total
        assert 2 * made.log <= made.total


def test_larger_datasets_get_more_of_everything():
    for devices, captions in itertools.product(DEVICES, (1.0, 5.0)):
        made = [resolved(facts(images, captions), devices) for images in SIZES]
        for field in (
            lambda c: c.total_steps * c.batch_size,
            lambda c: c.model.width * c.model.depth,
            lambda c: c.data.image_size,
            lambda c: c.text.vocab_size,
        ):
            values = [field(c) for c in made]
            assert values == sorted(values)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8])
def test_batches_are_divided_among_the_devices(count):
    for images, objective in itertools.product(SIZES, config.OBJECTIVES):
        c = resolved(facts(images), Devices("gpu", count), objective)
        assert c.batch_size % count == 0 and c.batch_size <= images / 2


@pytest.mark.parametrize("side", [20, 48, 64, 100, 375, 0])
def test_images_are_not_enlarged_and_fit_the_patches(side):
    for devices in DEVICES:
        c = resolved(facts(side=side), devices)
        patch = int(c.model.name.partition("/")[2])
        assert c.data.image_size % patch == 0
        assert not side or c.data.image_size <= max(side, 32)


def test_texts_hold_long_captions_and_all_characters():
    c = resolved(facts(tokens=70))
    assert c.text.length == 72
    assert resolved(facts(tokens=700)).text.length == rules.LONGEST_TEXT
    assert resolved(facts(tokens=5)).text.length == 8
    assert rules.vocabulary(5_000, characters=3_000) >= 3_000  # such as Chinese
    assert np.log2(rules.vocabulary(10**9, 60)) == 15


def test_images_are_not_mirrored_if_captions_say_left_and_right():
    assert resolved(facts(sided=0.004)).data.flip
    assert not resolved(facts(sided=0.05)).data.flip


def test_a_part_is_held_out_only_where_there_is_no_validation_split():
    assert resolved(facts(held_out=30)).data.held_out == 30
    assert resolved(facts(held_out=0)).data.held_out == -1
    assert [rules.held_out(n) for n in (2, 200, 6_000, 100_000)] == [1, 20, 600, 1_000]


def test_every_choice_is_one_line_with_its_reason_and_only_choices_differ():
    found = facts()
    for objective in config.OBJECTIVES:
        choices = rules.choose(found, DEVICES[1], objective)
        for choice in choices:
            assert "\n" not in choice.line and choice.line.endswith(")") and "(" in choice.line
            assert len(choice.line) < 180
        names = [name for choice in choices for name in choice.fields]
        assert len(names) == len(set(names))


def test_what_changes_between_starts_does_not_matter():
    assert resolved(facts()).to_dict() == resolved(facts()).to_dict()
    assert {f.name for f in dataclasses.fields(Devices)} == {"kind", "count"}
