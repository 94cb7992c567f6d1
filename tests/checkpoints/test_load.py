"""A run's learner loads as it was saved; an invalid workdir raises a clear error."""

import json
import shutil

import numpy as np
import pytest
from flax import nnx

from cap_pretrain.checkpoints.load import load_learner, read_config, read_weights
from cap_pretrain.data.text.tokenizers import train_sentencepiece
from cap_pretrain.errors import UserError
from tests import toy


@pytest.fixture(scope="module")
def run(tokenizer_path, tmp_path_factory):
    """The workdir of a captioner with averaged parameters and two checkpoints, and its state."""
    workdir = tmp_path_factory.mktemp("run")
    c = toy.config(model__depth=1, optim__ema=0.9)
    return workdir, toy.saved_run(c, workdir, tokenizer_path, 3, 7)


@pytest.fixture
def workdir(run, tmp_path):
    """A copy of the run that a test may corrupt."""
    shutil.copytree(run[0], tmp_path / "run")
    return tmp_path / "run"


def files_of(workdir):
    return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def test_averaged_parameters_come_back_bit_by_bit(run):
    workdir, state = run
    before = files_of(workdir)
    config, tokenizer, graphdef, variables = load_learner(workdir)
    toy.assert_same(variables, (state.ema, state.stats))
    assert np.abs(variables[0]["text_positions"] - state.params["text_positions"]).max() > 0.1
    assert config.optim.ema == 0.9 and config.is_locked
    assert tokenizer.max_len == config.text.length
    images = toy.batch(config)["image"]
    learner = nnx.merge(graphdef, *variables)
    assert learner.encode(images).pooled.shape == (len(images), 64)
    assert files_of(workdir) == before


def test_without_an_average_it_is_the_parameters(tokenizer_path, tmp_path):
    c = toy.config("dual_encoder", model__depth=1)
    state = toy.saved_run(c, tmp_path, tokenizer_path, 2)
    toy.assert_same(load_learner(tmp_path).variables, (state.params, state.stats))
    step, averaged, params, stats = read_weights(tmp_path)
    assert (step, averaged, stats) == (2, False, {})
    np.testing.assert_array_equal(
        params["encoder/norm/scale"], state.params["encoder"]["norm"]["scale"]
    )


def test_a_corrupt_checkpoint_is_skipped_and_left(workdir):
    shutil.rmtree(workdir / "checkpoints" / "7" / "learner" / "d")
    messages = []
    assert read_weights(workdir, say=messages.append).step == 3
    assert len(messages) == 1 and "checkpoints/7: is corrupt" in messages[0]
    assert (workdir / "checkpoints" / "7").is_dir()
    with pytest.raises(UserError, match="every requested checkpoint is corrupt"):
        read_weights(workdir, 7, say=messages.append)


def test_the_requested_step_is_read(run):
    assert read_weights(run[0]).step == 7
    assert read_weights(run[0], 3).step == 3
    with pytest.raises(UserError, match="has no checkpoint of step 5; there are 3, 7"):
        read_weights(run[0], 5)


def test_a_corrupt_optimizer_does_not_matter(workdir):
    shutil.rmtree(workdir / "checkpoints" / "7" / "optimizer")
    assert read_weights(workdir).step == 7


def test_fields_added_since_the_run_have_their_defaults(workdir):
    stored = json.loads((workdir / "config.json").read_text())
    del stored["learner"]["average"], stored["model"]["pool"], stored["deterministic"]
    (workdir / "config.json").write_text(json.dumps(stored))
    config = read_config(workdir)
    assert config.model.pool == "gap" and config.deterministic is False
    load_learner(workdir)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (shutil.rmtree, "is not the folder of a run: its config.json cannot be read"),
        (lambda w: (w / "config.json").write_text("{"), "config.json: is not the config of a run"),
        (lambda w: (w / "config.json").write_text("[]"), "config.json: is not the config of a run"),
        (lambda w: (w / "config.json").write_text("{}"), "config.json: is not the config of a run"),
        (lambda w: shutil.rmtree(w / "checkpoints"), "has no checkpoint; there are none at all"),
        (lambda w: shutil.rmtree(w / "tokenizer"), "cannot read the file .*tokenizer.model"),
    ],
)
def test_an_invalid_workdir_is_reported(corrupt, message, workdir):
    corrupt(workdir)
    with pytest.raises(UserError, match=message):
        load_learner(workdir)


def test_another_tokenizer_is_refused(workdir):
    captions = [f"{word} and {word}" for word in ("one", "two", "three")]
    train_sentencepiece(captions, workdir / "tokenizer", vocab_size=30)
    with pytest.raises(UserError, match="tokenizer.model: is not the file that the run was"):
        load_learner(workdir)


@pytest.mark.parametrize(
    ("section", "field", "value", "message"),
    [
        ("model", "width", 32, "is of shape .* instead of"),
        ("model", "pool", "map", "encoder/head/.* is missing instead of"),
        ("learner", "name", "dual_encoder", "does not fit the model in config.json"),
    ],
)
def test_the_config_of_another_model_is_refused(section, field, value, message, workdir):
    stored = json.loads((workdir / "config.json").read_text())
    stored[section][field] = value
    if field == "name":
        stored["learner"] = {"name": value}
    (workdir / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=message):
        load_learner(workdir)
