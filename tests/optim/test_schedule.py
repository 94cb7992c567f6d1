"""Durations in steps, from every unit that a config may use."""

import pytest

from cap_pretrain import config as configs
from cap_pretrain.optim import schedule
from tests import toy


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"warmup_steps": 7}, 7),
        ({"warmup_examples": 56}, 7),
        ({"warmup_examples": 57}, 8),  # rounded up
        ({"warmup_epochs": 0.28}, 7),
        ({"warmup_share": 0.07}, 7),
        ({"warmup_share": 0.0}, 0),
        ({"warmup_steps": 7, "warmup_examples": 800, "warmup_epochs": 3.0}, 7),
        ({"warmup_examples": 56, "warmup_epochs": 3.0, "warmup_share": 0.5}, 7),
        ({"warmup_epochs": 0.28, "warmup_share": 0.5}, 7),
        ({"warmup_share": 1e-9}, 1),
    ],
)
def test_durations_agree_and_the_first_given_counts(given, steps):
    c = configs.default()
    c.optim.warmup_share = 0.0
    for name, value in given.items():
        c.optim[name] = value
    assert schedule.duration(c.optim, "warmup", batch_size=8, epoch=200, total=100) == steps


def test_the_recipes_warm_up_is_ten_thousand_steps():
    c = configs.default()
    kwargs = dict(batch_size=8192, epoch=1, total=366_500)
    assert schedule.duration(c.optim, "warmup", **kwargs) == 10_000


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"total_steps": 10}, 10),
        ({"total_steps": 0, "total_examples": 80}, 10),
        ({"total_steps": 0, "total_examples": 81}, 11),
        ({"total_steps": 0, "total_epochs": 0.4}, 10),
        ({"total_steps": 10, "total_examples": 800, "total_epochs": 9.0}, 10),
        ({"total_steps": 0, "total_examples": 80, "total_epochs": 9.0}, 10),
    ],
)
def test_the_length_of_a_run_in_steps_examples_or_epochs(given, steps):
    assert schedule.make_schedule(toy.config(**given), epoch=200).total == steps


def test_the_rate_of_a_run_is_scaled_by_its_own_batch_size():
    c = toy.config(batch_size=48, optim__lr=0.3, optim__lr_batch=32, optim__decay="constant")
    c.optim.warmup_share = 0.0
    rate = schedule.learning_rate(c, schedule.make_schedule(c, epoch=200))
    assert float(rate(0)) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"total_steps": 10}, "10 steps, from total_steps=10"),
        ({"total_steps": 0, "total_epochs": 0.5}, "13 steps, from total_epochs=0.5"),
        (
            {"total_steps": 1000, "total_epochs": 0.5},
            "1,000 steps, from total_steps=1,000; ignoring total_epochs=0.5 "
            "(set total_steps=0 to use it)",
        ),
    ],
)
def test_the_log_names_the_length_that_counts(given, line):
    c = toy.config(**given)
    assert schedule.describe(c, schedule.make_schedule(c, epoch=200)) == line


@pytest.mark.parametrize(("ema", "steps", "told"), [(0.9999, 200, "98%"), (0.99, 200, "13%")])
def test_a_moving_average_that_is_too_long_is_told(ema, steps, told):
    (line,) = notes(ema, steps)
    assert line.startswith(f"optim.ema: {ema} is long for {steps} steps") and told in line
    better = float(line.rstrip(".").rpartition(" ")[2])
    assert not notes(better - 1e-4, steps) and notes(better + 2e-4, steps)


def notes(ema, steps):
    c = toy.config(optim__ema=ema, total_steps=steps)
    return schedule.notes(c, schedule.make_schedule(c, epoch=1))


def test_no_moving_average_is_not_too_long():
    assert not notes(0.0, 200) and not notes(0.9999, 0)
