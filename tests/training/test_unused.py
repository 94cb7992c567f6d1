"""A field given on the command line that has no effect is named, with the reason."""

import random

import pytest

from cap_pretrain import config as configs
from cap_pretrain import learners
from cap_pretrain.data.text.words import Rules, write_words
from cap_pretrain.optim import schedule
from cap_pretrain.training.changes import TRAINING, fields, unused
from tests import toy


def with_given(c, given):
    c.update_from_flattened_dict(given)
    return unused(c, list(given))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"text.words.min_count": 6}, "text.words.min_count=6 (text.kind is sentencepiece)"),
        ({"text.kind": "words", "text.vocab_size": 9}, "text.vocab_size=9 (text.kind is words)"),
        ({"text.tokenizer": "a", "text.vocab_size": 9}, "text.vocab_size=9 (text.tokenizer is"),
        ({"data.regions": 2}, "data.regions=2 (captioner reads no boxes)"),
        (
            {"text.tokenizer": "PAIRS", "text.lower": False},
            "text.lower=False (the tokenizer is CLIP",
        ),
        ({"text.tokenizer": "WORDS", "text.lower": False}, "False (the tokenizer has whole words)"),
        (
            {"text.kind": "words", "text.punctuation": False},
            "False (the tokenizer has whole words)",
        ),
        ({"text.kind": "words", "text.lower": False}, None),
        ({"text.tokenizer": "a", "text.lower": False, "text.punctuation": False}, None),
        ({"plateau.patience": 2}, "plateau.patience=2 (plateau.figure is empty)"),
        ({"model.keep_tokens_until": 0.5}, "until=0.5 (model.keep_tokens is 1)"),
        ({"checkpoint.best_mode": "max"}, "best_mode='max' (checkpoint.best is empty)"),
        ({"optim.cooldown_steps": 5}, "optim.cooldown_steps=5 (optim.decay is cosine)"),
        ({"log.every_epochs": 0.5}, "log.every_epochs=0.5 (log.every_steps counts)"),
        ({"optim.warmup_steps": 3, "optim.warmup_share": 0.5}, "share=0.5 (optim.warmup_steps"),
        ({"optim.warmup_share": 0.5, "seed": 4, "text.length": 9}, None),
        ({"optim.decay": "rsqrt", "optim.cooldown_steps": 5}, None),
        ({"log.every_epochs": 0.0, "plateau.patience": 8}, None),
    ],
)
def test_what_has_no_effect_is_named(given, said, tmp_path):
    (tmp_path / "PAIRS").write_text("#version\n")
    write_words(["a word"], tmp_path, Rules(min_count=1), lower=True).rename(tmp_path / "WORDS")
    if given.get("text.tokenizer", "").isupper():
        given = given | {"text.tokenizer": str(tmp_path / given["text.tokenizer"])}
    lines = with_given(toy.config(), given)
    assert len(lines) == bool(said)
    if said:
        assert said in lines[0] and lines[0].count("=") == 1
        assert lines[0].startswith("Given on the command line, but not used: ")


def test_an_evaluation_names_every_field_of_training():
    c = toy.load("evaluate")
    c.learner = learners.defaults("encoder")
    sections = ("optim", "checkpoint", "eval", "log", "plateau", "text")
    given = {"batch_size": 7, "accumulate": 3, "data.flip": True, "data.fraction": 0.5}
    for name, value in fields(c.to_dict()).items():
        if name.split(".")[0] in sections and not isinstance(value, tuple):
            other = f"{value}x" if isinstance(value, str) else not value
            given[name] = other if isinstance(value, (str, bool)) else value + 1
    (line,) = with_given(c, given)
    for name, value in given.items():
        reason = "the run has no steps" if not name.startswith("text") else "encoder reads no text"
        assert f" {name}={value!r} ({reason})" in line
    assert all(configs.get(c, name) is not None for name in TRAINING)


def test_of_two_durations_the_one_that_counts_is_not_named():
    """Changing a field that is named never changes the schedule; 300 random configs."""
    rng = random.Random(0)
    names = [
        f"{name}_{unit}"
        for name in ("optim.warmup", "optim.cooldown", "checkpoint.every", "eval.every")
        for unit in ("steps", "examples", "epochs", "share")
    ]
    c = toy.config(total_steps=400, optim__decay="constant")
    for name in names:
        c.update_from_flattened_dict({name: type(configs.get(c, name))(0)})
    named = 0
    for _ in range(300):
        given = {n: rng.choice([0, 0, 1, 40]) for n in names if not n.endswith("share")}
        given |= {n: float(rng.choice([0, 0.1])) for n in names if n.endswith(("share", "epochs"))}
        lines = with_given(c, given)
        before = schedule.make_schedule(c, epoch=200)
        for name in names:
            if lines and f" {name}=" in lines[0]:
                named += 1
                c.update_from_flattened_dict({name: type(given[name])(0)})
        assert schedule.make_schedule(c, epoch=200) == before
    assert named > 200
