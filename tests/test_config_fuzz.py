"""Any values of any fields end in a config that works or in a message of a line or two."""

import random

import pytest

from cap_pretrain import config as configs
from cap_pretrain import inputs
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.config import fields
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.optim import schedule
from cap_pretrain.training.changes import unused
from cap_pretrain.validation import validate
from tests import toy

FILES = ("quickstart", "evaluate", "finetune", "pretext", "recurrent", "coco_captioning")
VALUES = {
    int: (0, 1, 3, 7, -1, -5, 10**6, 10**12, 2**31, 2**63, 10**30),
    float: (0.0, -0.5, 0.1, 1.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf")),
    str: ("", "x", "x" * 300, "../..", "\0", "/", "a:0.2+b", "scenes:nan", "B/0", "L/9", "\ud800"),
    tuple: ((), (("x",),), (("(", 1.0),), ((".*", "a"),), (1, 2), (((), ()),)),
}


def take(c, given):
    """Do with a config what a start does before it builds anything."""
    unused(c, list(given))
    warm_start.resolve(c, list(given), str)
    validate(c)
    if configs.trains(c):
        durations = schedule.make_schedule(c, epoch=200)
        schedule.learning_rate(c, durations)
        schedule.describe(c, durations)
    sharding.make_mesh(c)
    if c.data.name == "scenes" and c.data.scenes.length_train < 1000:  # labels are computed
        inputs.open_sources(c)


def rejected(trials, seed):
    """Return the messages about random values of one or two fields, with these."""
    rng, messages = random.Random(seed), []
    loaded = [toy.load(name) for name in FILES]
    for c in loaded:
        c.data.scenes.length_train = 60
    names = [fields(c.to_dict()) for c in loaded]
    for _ in range(trials):
        which = rng.randrange(len(FILES))
        c, given = loaded[which].copy_and_resolve_references(), {}
        for field in rng.sample(list(names[which]), 2):
            value = names[which][field]
            given[field] = not value if isinstance(value, bool) else rng.choice(VALUES[type(value)])
        c.update_from_flattened_dict(given)
        try:
            take(c, given)
        except UserError as error:
            messages.append((str(error), given))
    return messages


@pytest.mark.parametrize(
    "trials", [100, pytest.param(2000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_any_values_give_a_config_or_a_short_message(trials):
    messages = rejected(trials, seed=trials)
    assert len(messages) > trials / 10
    for message, given in messages:
        assert 1 <= len(message.splitlines()) <= 2, given


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optim.lr": float("nan")}, "optim.lr: nan is not a finite number"),
        ({"optim.cooldown_share": float("inf")}, "optim.cooldown_share: inf is not a finite"),
        ({"batch_size": 10**30}, "batch_size: 10{30} is not a finite number below 2.63"),
        ({"checkpoint.every_steps": -5}, "checkpoint.every_steps: -5 must not be negative"),
        ({"seed": -1}, "seed: -1 must not be negative"),
        ({"model.dropout": 1.5}, r"model.dropout: 1.5 is not in \[0, 1\)"),
        ({"optim.lr_rules": (1, 2)}, r"optim.lr_rules: 1 is not a pair \(pattern, number\)"),
        ({"optim.decay_rules": ((".*", "a"),)}, "optim.decay_rules: .* is not a pair"),
        ({"text.tokenizer": "x" * 300}, "text.tokenizer: cannot be read .*name too long"),
    ],
)
def test_values_that_no_field_takes(given, said):
    c = toy.config()
    c.update_from_flattened_dict(given)
    with pytest.raises(UserError, match=said):
        validate(c)


def test_an_encoder_path_that_no_file_has():
    with pytest.raises(UserError, match="encoder: cannot be read .*name too long"):
        warm_start.resolve(toy.config(encoder="x" * 300))
