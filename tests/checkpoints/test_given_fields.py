"""No field is accepted and then silently replaced by that of the encoder's run."""

import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import evals, train
from cap_pretrain.checkpoints import earlier, warm_start
from cap_pretrain.checkpoints.load import Weights
from cap_pretrain.errors import UserError
from cap_pretrain.training.changes import fields
from tests import toy

CASES = [("evaluate", "evals=loss"), ("finetune", ""), ("coco_captioning", "")]
CASES += [("linear_probe", ""), ("linear_probe", "protocol=sgd")]


def another(field, value):
    """Return another value of the same type."""
    if field == "model.name":
        return "L/14"
    if field.endswith("image_size"):
        return 64
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}x"
    return (("y", 1.0),) if isinstance(value, tuple) else value + 1


@pytest.fixture
def of_run(tmp_path, monkeypatch):
    """The path of a run whose config differs from the default and from what the tests give."""
    saved = configs.default()
    for field, value in fields(saved.to_dict()).items():
        saved.update_from_flattened_dict({field: another(field, another(field, value))})
    saved.model.name, saved.data.image_size = "mu/8", 48
    positions = {"encoder/positions": np.ones((36, 4), np.float32)}
    monkeypatch.setattr(warm_start, "read_config", lambda _: saved)
    monkeypatch.setattr(warm_start, "read_weights", lambda *_: Weights(3, False, positions, {}))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def outcome(c, field, wanted, given):
    """Return what becomes of a field: honored, or the message that names it."""
    said = []
    try:
        resolved, _ = warm_start.resolve(c, given, said.append)
    except UserError as error:
        return f"refused {error}"
    kept = configs.get(resolved, field) == wanted
    return "honored" if kept and not said else "\n".join(said)


@pytest.mark.parametrize("on_command_line", [True, False])
@pytest.mark.parametrize(
    "case",
    [c if c[0] == "evaluate" else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
    ids="-".join,
)
def test_every_field_is_honored_or_refused_or_named(case, on_command_line, of_run):
    names = fields(toy.load(*case).to_dict())
    found = {True: f"refused {{0}}: {{1!r}} is given, but step 3 of {of_run} needs "}
    found[False] = f"Settings of the config file that step 3 of {of_run} replaces: {{0}}={{1!r}} ("
    expected, outcomes = found[on_command_line], []
    for field, value in names.items():
        if field in ("encoder", "learner.name") or field.startswith("evals."):
            continue
        c = toy.load(*case)
        c.encoder = str(of_run)
        wanted = another(field, value)
        c.update_from_flattened_dict({field: wanted})
        outcomes.append(outcome(c, field, wanted, [field] if on_command_line else []))
        said = expected.format(field, wanted)
        assert outcomes[-1] == "honored" or outcomes[-1].startswith(said), field
        assert len(outcomes[-1].splitlines()) == 1
    assert "honored" in outcomes and len(set(outcomes)) > 5


def test_a_default_that_is_given_is_no_default(of_run):
    c = toy.load("evaluate")
    c.encoder = str(of_run)
    for given, expected in (([], "nonexx"), (["data.crop"], "none")):
        assert warm_start.resolve(c, given, print)[0].data.crop == expected
    with pytest.raises(UserError, match="text.length: 64 is given, but step 3 of .* needs 66"):
        warm_start.resolve(c, ["text.length"])


def test_an_argument_of_the_config_file_that_has_no_effect_is_named(of_run):
    c = toy.load("pretrain", "model=S/16")
    c.encoder = str(of_run)
    message = f"step 3 of {of_run} replaces: model.name='S/16' (now 'mu/8')."
    assert outcome(c, "model.name", "mu/8", []) == f"Settings of the config file that {message}"
    assert outcome(c, "model.name", "S/16", ["model.name"]).startswith("refused model.name: 'S/16'")


@pytest.mark.parametrize("name", ["evaluate", "pretrain"])
def test_position_embeddings_follow_a_given_image_size(name, of_run):
    c = toy.load(name)
    c.encoder, c.data.image_size = str(of_run), 64
    resolved, weights = warm_start.resolve(c, ["data.image_size"], print)
    assert resolved.data.image_size == 64
    np.testing.assert_allclose(weights.params["encoder/positions"], np.ones((64, 4)), rtol=1e-6)


@pytest.mark.slow
def test_an_evaluation_uses_what_is_given(tokenizer_path, tmp_path):
    c = toy.config("dual_encoder", optim__ema=0.5, model__depth=1, model__width=16, model__mlp=32)
    toy.saved_run(c, tmp_path / "run", tokenizer_path, 3)
    found = {}
    for size in (0, 32):
        c = toy.load("evaluate", "evals=loss")
        c.encoder = str(tmp_path / "run")
        c.evals = ConfigDict({"val": evals.defaults("loss", batch_size=8)})
        given = {"data.scenes.length_test": 8, "data.eval_split": "test"}
        given |= {"data.image_size": size} if size else {}
        c.update_from_flattened_dict(given)
        train.run(c, tmp_path / str(size), given=list(given))
        result = json.loads((tmp_path / str(size) / "evals" / "val" / "0.json").read_text())
        assert result["split"] == "test" and result["examples"] == 8
        kept = json.loads((tmp_path / str(size) / "config.json").read_text())
        assert kept["data"]["scenes"]["length_test"] == 8
        assert kept["data"]["image_size"] == (size or 16)
        found[size] = result["loss"]
    assert found[0] != found[32]
    c.model.depth = 2
    with pytest.raises(UserError, match="model.depth: 2 is given, but step 3 of .* needs 1; leave"):
        train.dry_run(c, tmp_path / "plan", given=["model.depth"])


def test_a_run_resumes_without_what_it_began_with(tokenizer_path, tmp_path, capsys):
    c = toy.config("captioner", model__name="S/8", text__tokenizer=str(tmp_path / "gone.model"))
    c.encoder = "gone/run"
    began = c.copy_and_resolve_references()
    began.model.name, began.model.depth = "mu/8", 1
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "config.json").write_text(configs.to_json(began))
    with pytest.raises(UserError, match="text.tokenizer: there is no file"):
        train.dry_run(c, tmp_path)
    path = tmp_path / "tokenizer" / "tokenizer.model"
    path.parent.mkdir()
    shutil.copy(tokenizer_path, path)
    assert "captioner mu/8, vocabulary" in train.dry_run(c, tmp_path)
    assert f"that the run in {tmp_path} replaces: model.name='S/8' (" in capsys.readouterr().out
    with pytest.raises(UserError, match="model.depth: 0 is given, but the run in .* needs 1"):
        warm_start.resolve(c, ["model.depth"], workdir=tmp_path)
    c.encoder = "elsewhere"
    resolved, weights = warm_start.resolve(c, workdir=tmp_path)
    assert weights is None
    with pytest.raises(UserError, match="encoder was 'gone/run', is now 'elsewhere'"):
        earlier.allowed_changes(resolved, tmp_path, [])
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    with pytest.raises(
        UserError, match="elsewhere: is not the folder of a run, and is not a file, nor"
    ):
        warm_start.resolve(c, workdir=tmp_path)


@pytest.mark.slow
def test_it_takes_the_next_step_without_them(tokenizer_path, tmp_path):
    small = dict(model__depth=1, model__width=16, model__mlp=32)
    run, own = tmp_path / "run", tmp_path / "own.model"
    shutil.copy(tokenizer_path, own)
    toy.saved_run(toy.config("dual_encoder", **small), run, tokenizer_path, 3)
    c = toy.config("captioner", text__tokenizer=str(own), encoder=str(run), total_steps=1)
    train.run(c, tmp_path / "mine")
    shutil.rmtree(run)
    own.unlink()
    c.total_steps = 2
    train.run(c, tmp_path / "mine", ["total_steps"])
    assert [line["step"] for line in toy.losses(tmp_path / "mine")] == [1, 2]
