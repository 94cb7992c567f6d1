"""`cap fields`: every field with its default and documentation, and hints where fields are."""

import pytest

from cap_pretrain import config as configs
from cap_pretrain import evals, learners
from cap_pretrain.cli import documentation
from cap_pretrain.commands import fields
from cap_pretrain.optim.optimizers import OPTIMIZERS


def documented(*sections):
    return {
        k: v for section in sections for entry in section.entries for k, v in entry.fields.items()
    }


def test_every_field_of_the_config_is_there_with_its_default_and_documented():
    whole = documentation.of_config()
    default = configs.fields(configs.default().to_dict())
    assert documented(whole) == {k: v for k, v in default.items() if not k.startswith("learner.")}
    assert all(entry.text for entry in whole.entries)


@pytest.mark.parametrize("name", evals.REGISTRY)
def test_every_option_of_an_evaluator(name):
    section = documentation.of_evaluator(name)
    options = evals.defaults(name).to_dict()
    options.pop("evaluator")
    assert documented(section) == {f"evals.{name}.{k}": v for k, v in options.items()}
    assert section.heading and all(entry.text for entry in section.entries)


@pytest.mark.parametrize("name", learners.REGISTRY)
def test_every_option_of_a_learner(name):
    section = documentation.of_learner(name)
    options = learners.defaults(name).to_dict()
    options.pop("name")
    assert documented(section) == {f"learner.{k}": v for k, v in options.items()}
    assert section.heading and all(entry.text for entry in section.entries)


def test_optimizers_are_described():
    assert documentation.of_optimizers().keys() == OPTIMIZERS.keys()
    assert all(documentation.of_optimizers().values())


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("optim.lr_batch", "optim.lr_batch = 0\n    The batch size for which `lr` is given"),
        ("--config.optim.b2", "optim.b1 = 0\noptim.b2 = 0\noptim.eps = 0\n    Decay rates"),
        ("evals.knn", "evals.knn.temperature = 0.07"),
        ("learner.simclr", "learner.blur = True"),
        ("evals.knn.k", "evals.knn.k = 20"),
        ("learner.ring", "dual_encoder: "),
        ("image_size", "data.image_size = 224"),
        ("text.tokenizer", 'text.tokenizer = ""'),
        ("evals", "zero_shot"),
    ],
)
def test_a_field_a_section_or_part_of_a_name(prefix, said, capsys):
    assert fields.main([prefix]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("prefix", "said"), [("imagesize", "Did you mean 'data.image_size'"), ("qqq", "`cap fields`")]
)
def test_a_field_that_is_not_there(prefix, said, capsys):
    assert fields.main([prefix]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("image_size", " The field is data.image_size."),
        ("optim.image_size", " The field is data.image_size."),
        ("evals.knn.k", " This config has the evaluators loss."),
        ("learner.ring", " ring is an option of dual_encoder, not of captioner."),
        ("xyz", ""),
        ("evals.loss.limit", ""),
    ],
)
def test_a_wrong_field_says_where_the_right_one_is(field, hint):
    config = configs.default()
    with config.unlocked():
        config.evals.loss = evals.defaults("loss")
    assert documentation.where(["seed", field], config) == hint
