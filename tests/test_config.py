"""The configuration: arguments, durations, and every mistake that can be seen before building."""

import json

import pytest

from cap_pretrain import config as configs
from cap_pretrain import evals, learners, train
from cap_pretrain.errors import UserError
from cap_pretrain.training.changes import check_unchanged
from cap_pretrain.validation import validate
from tests import toy


def test_the_default_is_locked_and_says_what_is_near():
    c = configs.default()
    with pytest.raises(AttributeError, match="learner"):
        c.lerner = 1
    with pytest.raises(AttributeError, match="cooldown_steps"):
        c.optim.coldown_steps = 1
    assert json.loads(configs.to_json(c)) == json.loads(json.dumps(c.to_dict()))


def test_arguments_have_defaults_and_are_overridden():
    args = configs.arguments("data=coco,model=B/16", objective=("cap", "clip"), model="", data="a")
    assert vars(args) == {"objective": "cap", "model": "B/16", "data": "coco"}
    assert configs.arguments(None, data="a").data == "a"
    assert configs.arguments("data=a=b", data="").data == "a=b"  # a path may hold anything


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("objectve=cap", "no argument 'objectve'.*Did you mean 'objective'"),
        ("objective", "no argument 'objective' in 'objective'"),
        ("objective=clap", "objective='clap' is unknown. Did you mean 'clip'|'cap'"),
        ("objective=xyz", "objective='xyz' is unknown. Choose from: cap, clip."),
    ],
)
def test_unknown_arguments(text, said):
    with pytest.raises(UserError, match=said):
        configs.arguments(text, objective=("cap", "clip"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dtype": "float8"}, "dtype: 'float8' is unknown. Did you mean 'float"),
        ({"optim__name": "adam"}, "optim.name: 'adam' is unknown. Did you mean 'adamw'"),
        ({"optim__decay": "cosin"}, "optim.decay: 'cosin' is unknown. Did you mean 'cosine'"),
        ({"model__pool": "cls"}, "model.pool: 'cls' is unknown. Did you mean 'class'"),
        ({"model__pool": "class"}, "model.pool: 'class' needs --config.model.class_token=True"),
        ({"model__norm_eps": 0.0}, "model.norm_eps: 0.0 must be positive"),
        ({"model__activation": "relu"}, "model.activation: 'relu' is unknown. Did you mean 'gelu'"),
        ({"model__name": "Q/8"}, "model.name: no size 'Q'"),
        ({"model__name": "B"}, "model.name: 'B' lacks a patch size; write it as B/16"),
        ({"model__heads": 3}, "model.heads: 3 does not divide the width 64"),
        ({"model__depth": -1}, "model.depth: -1 must not be negative"),
        ({"model__decoder_width": 33}, "model.decoder_heads: 2 does not divide the width 33"),
        ({"model__decoder_heads": 5}, "model.decoder_heads: 5 does not divide the width 64"),
        ({"model__decoder_mlp": -4}, "model.decoder_mlp: -4 must not be negative"),
        ({"data__image_size": 20}, "data.image_size: 20 is not a multiple of the patch size 8"),
        ({"batch_size": 0}, "batch_size: 0 must be at least 1"),
        ({"text__length": 0}, "text.length: 0 must be at least 1"),
        ({"text__vocab_size": 99999999999}, "text.vocab_size: 99999999999 must be at most"),
        ({"batch_size": 2**31}, "batch_size: 2147483648 must be at most 2147483647"),
        ({"accumulate": 3}, "accumulate: 3 parts do not divide batch_size=8"),
        ({"total_steps": 0}, "total_steps: .*not set; give --config.total_steps"),
        ({"optim__lr": -1.0}, "optim.lr: -1.0 must not be negative"),
        ({"optim__lr_batch": -1}, "optim.lr_batch: -1 must not be negative"),
        ({"optim__ema": 1.0}, r"optim.ema: 1.0 is not in \[0, 1\)"),
        ({"text__tokenizer": "no.model"}, "text.tokenizer: there is no file 'no.model'"),
        ({"data__name": "a:0+b"}, "data.name .*the weight of 'a' is 0"),
    ],
)
def test_mistakes_are_told_by_field_before_anything_is_built(fields, said):
    with pytest.raises(UserError, match=said) as error:
        validate(toy.config(**fields))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("field", "value"), [("dtype", "float16"), ("model__attention", "cudnn")])
def test_what_the_devices_cannot_do_is_told_at_once(field, value, tmp_path):
    name = field.replace("__", ".")
    with pytest.raises(UserError, match=f"{name}: {value} is (not )?for") as error:
        train.run(toy.config(**{field: value}), tmp_path / "run")
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("learner", "options", "said"),
    [
        ("captioner", {"parallel_fraction": 1.5}, "learner.parallel_fraction: 1.5"),
        ("captioner", {"average": "batch"}, "learner.average: 'batch'"),
        ("captioner", {"label_smoothing": 1.0}, "learner.label_smoothing: 1.0"),
        ("dual_encoder", {"contrast": "hinge"}, "learner.contrast: 'hinge'"),
    ],
)
def test_options_of_learners_are_checked_however_they_are_given(learner, options, said):
    with pytest.raises(UserError, match=said):
        learners.defaults(learner, **options)
    c = toy.config(learner)
    for name, value in options.items():
        c.learner[name] = value
    with pytest.raises(UserError, match=said):
        validate(c)


def test_unknown_learners():
    with pytest.raises(UserError, match="learner.name: no learner 'captoner'. Did you mean"):
        learners.defaults("captoner")
    c = toy.config()
    c.learner.name = "clip"
    with pytest.raises(UserError, match="no learner 'clip'. Choose from: .*captioner"):
        validate(c)


def stored(tmp_path, config):
    (tmp_path / "config.json").write_text(configs.to_json(config))
    return tmp_path / "config.json"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"data__workers": 3, "mesh__fsdp": 4, "model__remat": "full", "deterministic": True},
        {"checkpoint__keep_last": 9, "log__ids": True, "eval__every_steps": 3},
        {"evals": {"val": evals.defaults("loss")}},
    ],
)
def test_where_and_how_fast_a_run_goes_may_change(fields, tmp_path):
    path = stored(tmp_path, toy.config())
    assert check_unchanged(toy.config(**fields), path) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optim__lr": 0.5}, "optim.lr was 0.001, is now 0.5"),
        ({"seed": 1}, "seed was 0, is now 1"),
        ({"optim__moment_dtype": "bfloat16"}, "optim.moment_dtype was '', is now 'bfloat16'"),
        (
            {"total_steps": 3, "data__name": "b"},
            "'scenes', is now 'b'; total_steps was 2, is now 3",
        ),
        (
            {"optim__decay_rules": ((".*", 0.0),)},
            r"decay_rules was \[\], is now \[\['.\*', 0.0\]\]",
        ),
        ({"data__scenes__shapes": 2}, "data.scenes.shapes was 8, is now 2"),
    ],
)
def test_what_is_learned_may_not_unless_allowed(fields, said, tmp_path):
    path, c = stored(tmp_path, toy.config()), toy.config(**fields)
    with pytest.raises(UserError, match=said) as error:
        check_unchanged(c, path)
    assert len(str(error.value).splitlines()) == 2
    allowed = str(error.value).rpartition("--allow_changes=")[2].rstrip(".").split(",")
    with pytest.raises(UserError):
        check_unchanged(c, path, allowed[1:])
    assert len(check_unchanged(c, path, allowed)) == len(allowed)
    sections = [field.partition(".")[0] for field in allowed]
    assert check_unchanged(c, path, sections) == check_unchanged(c, path, ["all"])


def test_another_learner_is_another_config(tmp_path):
    path = stored(tmp_path, toy.config())
    with pytest.raises(UserError, match="learner.name was 'captioner', is now 'dual_encoder'"):
        check_unchanged(toy.config("dual_encoder"), path)


def test_a_field_that_is_new_counts_with_its_default(tmp_path):
    c = toy.config()
    then = json.loads(configs.to_json(c))
    del then["optim"]["ema"], then["learner"]["label_smoothing"]
    then["optim"]["gone"] = 3
    path = tmp_path / "config.json"
    path.write_text(json.dumps(then))
    with pytest.raises(UserError, match="config: optim.gone was 3, is now None[.]"):
        check_unchanged(c, path)
    c.optim.ema = 0.5
    with pytest.raises(UserError, match=r"optim.ema was 0.0, is now 0.5[.]"):
        check_unchanged(c, path, ["optim.gone"])


@pytest.mark.parametrize("content", ["", "{torn", "[1]"])
def test_a_stored_config_that_cannot_be_read(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json: is not readable JSON"):
        check_unchanged(toy.config(), tmp_path / "config.json")


def test_the_best_checkpoint_needs_an_evaluator_of_the_config():
    c = toy.config(checkpoint__best="vall/loss")
    c.evals = {"val": evals.defaults("loss")}
    with pytest.raises(UserError, match="checkpoint.best: 'vall/loss' .*Did you mean 'val'"):
        validate(c)
    c.checkpoint.best = "val/loss"
    validate(c)
