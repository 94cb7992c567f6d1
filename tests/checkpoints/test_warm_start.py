"""Initializing from an existing encoder: one of a workdir, or one trained elsewhere."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cap_pretrain import evals, learners, train
from cap_pretrain.checkpoints import stored, warm_start
from cap_pretrain.checkpoints.load import read_config, read_weights
from cap_pretrain.convert import export
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Interrupted
from cap_pretrain.evals.probes import features
from cap_pretrain.evals.suite import Suite
from cap_pretrain.training import setup, watch
from tests import toy

SMALL = dict(model__depth=1, model__width=32, model__mlp=64)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tokenizer_path):
    """The workdir of a CLIP model trained for two steps, with averaged parameters."""
    c = toy.load("pretrain", "objective=clip")
    c = toy.shrink(c, text__tokenizer=str(tokenizer_path), optim__ema=0.5, **SMALL)
    c.evals = ConfigDict({"val": evals.defaults("loss", batch_size=10)})
    folder = tmp_path_factory.mktemp("clip")
    train.run(c, folder)
    return folder


def evaluation(path, **fields):
    """Return a config that evaluates the run or checkpoint at `path`."""
    c = toy.load("evaluate", "evals=loss")
    c.encoder = str(path)
    c.evals = ConfigDict({"val": evals.defaults("loss", batch_size=10)})
    for field, value in fields.items():
        c[field] = value
    return c


@pytest.mark.slow
def test_evaluating_a_run_again_gives_its_own_results(workdir, tmp_path, capsys):
    train.run(evaluation(workdir), tmp_path)
    assert "Initialized from step 2 of" in capsys.readouterr().out
    own, again = (
        json.loads((folder / "evals" / "val" / f"{step}.json").read_text())
        for folder, step in ((workdir, 2), (tmp_path, 0))
    )
    assert again.pop("weights") == f"step 2 of {workdir}"
    assert {**again, "step": 2} == own  # by the average, on the same data
    assert [line["step"] for line in toy.lines(tmp_path)] == [0]

    before = (tmp_path / "evals" / "val" / "0.json").stat().st_mtime_ns
    train.run(evaluation(workdir), tmp_path)
    assert (tmp_path / "evals" / "val" / "0.json").stat().st_mtime_ns == before
    changed = evaluation(workdir)
    changed.evals.val.batch_size = 5
    train.run(changed, tmp_path)
    assert (tmp_path / "evals" / "val" / "0.json").stat().st_mtime_ns != before
    with pytest.raises(UserError, match="seed was 0, is now 1"):
        train.run(evaluation(workdir, seed=1), tmp_path)


@pytest.mark.slow
def test_any_checkpoint_of_a_workdir_can_be_named(workdir):
    config, found = warm_start.resolve(evaluation(workdir / "checkpoints" / "2"))
    assert found.source == f"step 2 of {workdir}" and config.learner.name == "dual_encoder"
    with pytest.raises(UserError, match="has no checkpoint of step 7; there are"):
        warm_start.resolve(evaluation(workdir / "checkpoints" / "7"))


@pytest.fixture
def bare(workdir, tmp_path):
    """The encoder of that run, exported to a `transformers` folder."""
    params = read_weights(workdir).params
    of_encoder = {k.removeprefix("encoder/"): v for k, v in params.items() if "encoder/" in k}
    (tmp_path / "bare").mkdir()
    export.write_vision_model(tmp_path / "bare", read_config(workdir), of_encoder)
    return tmp_path / "bare"


def probe(path):
    """Return a config that probes the encoder at `path` on a few scenes."""
    c = toy.load("evaluate", "evals=knn,data=scenes")
    c.encoder = str(path)
    c.data.scenes.update(length_train=40, length_val=20)
    return c


@pytest.mark.slow
def test_what_only_evaluates_has_no_optimizer(workdir, bare, tmp_path, monkeypatch):
    made = []

    def init_state(*args):
        made.append(train_init_state(*args))
        return made[-1]

    train_init_state = setup.init_state
    monkeypatch.setattr(setup, "init_state", init_state)
    for name, path in (("run", workdir), ("folder", bare)):
        train.run(probe(path), tmp_path / name)
        result = json.loads((tmp_path / name / "evals" / "knn" / "0.json").read_text())
        assert result["images"] == 20 and result["dimensions"] == 32
        assert not list((tmp_path / name).glob("checkpoints/*"))
    for init, abstract, *_ in made:
        state = init()
        assert jax.tree.leaves(state.params) and not jax.tree.leaves(state.opt_state)
        assert jax.tree.structure(state) == jax.tree.structure(abstract)


def test_an_interrupted_evaluation_saves_nothing(bare, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        raise Interrupted

    monkeypatch.setattr(Suite, "run", interrupted)
    with pytest.raises(watch.Stopped, match="SIGTERM: stopped while it was evaluating") as stopped:
        train.run(probe(bare), tmp_path / "run")
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_the_plan_of_an_evaluation_has_no_training(bare, tmp_path):
    printed = train.dry_run(probe(bare), tmp_path)
    made = json.loads((tmp_path / "plan.json").read_text())
    sizes = made["bytes_per_device"]
    assert (
        sizes["parameters"] == 4 * made["parameters"]["total"] == 4 * made["parameters"]["encoder"]
    )
    assert sizes["optimizer"] == sizes["gradients"] == sizes["ema"] == 0
    assert made["flops_per_example"] == {} and "FLOP" not in printed


@pytest.mark.slow
def test_features_are_computed_once_and_kept_in_the_workdir(tokenizer_path, tmp_path, monkeypatch):
    c = toy.config("captioner", text__tokenizer=str(tokenizer_path), eval__every_steps=1, **SMALL)
    c.evals = ConfigDict({name: evals.defaults(name) for name in ("knn", "linear_probe")})
    computed = []
    whole = features.Features._compute

    def compute(self, variables):
        computed.append(self)
        return whole(self, variables)

    monkeypatch.setattr(features.Features, "_compute", compute)
    train.run(c, tmp_path)
    assert len(computed) == 4  # of two splits, after each of two steps, for both probes
    assert len(list((tmp_path / "features").glob("*.npz"))) == 2


@pytest.mark.slow  # the whole recipe coco_captioning
def test_another_learner_takes_the_encoder_and_nothing_else(workdir, tokenizer_path, tmp_path):
    fields = dict(text__tokenizer=str(tokenizer_path), data__image_size=24, model__name="S/8")
    c = toy.shrink(
        toy.load("coco_captioning"), model__decoder_depth=1, eval__every_steps=1, **fields
    )
    c.model.update(dict(decoder_width=24, decoder_mlp=40, decoder_heads=3))
    c.evals.val.limit = c.evals.samples.count = c.evals.scores.limit = 8
    with pytest.raises(UserError, match="encoder: is empty, but optim.lr_rules freezes it"):
        train.run(c, tmp_path)
    c.encoder = str(workdir)
    train.run(c, tmp_path)
    theirs = stored.load_arrays(workdir, 2)
    ours = stored.load_arrays(tmp_path, 2)
    of_encoder = [path for path in ours if path.startswith("learner/params/encoder/")]
    assert len(of_encoder) > 10
    for path in of_encoder:
        np.testing.assert_array_equal(ours[path], theirs[path.replace("/params/", "/ema/")])
    assert ours["learner/params/decoder/embedding/embedding"].shape[1] == 24
    kernel = ours["learner/params/decoder/blocks/cross_attention/key/kernel"]
    assert kernel.shape == (1, 32, 24)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert kept["model"]["name"] == "mu/8" and kept["data"]["image_size"] == 16
    assert kept["model"]["decoder_depth"] == 1 and kept["model"]["decoder_heads"] == 3
    assert kept["learner"]["name"] == "captioner"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "argument", "moves"),
    [
        ("finetune", "fraction=0.5", True),
        ("linear_probe", "protocol=sgd", False),
    ],
)
def test_an_encoder_is_fine_tuned_or_left_as_it_is(name, argument, moves, workdir, tmp_path):
    c = toy.shrink(toy.load(name, argument), encoder=str(workdir), model__name="mu/8")
    c.evals.accuracy.batch_size = 10
    train.run(c, tmp_path)
    theirs, ours = (stored.load_arrays(folder, 2) for folder in (workdir, tmp_path))
    path = "encoder/blocks/mlp/up/kernel"
    same = np.array_equal(theirs[f"learner/ema/{path}"], ours[f"learner/params/{path}"])
    assert same != moves
    assert ours["learner/params/head/kernel"].shape == (32, 8)  # scenes have eight shapes
    assert json.loads((tmp_path / "config.json").read_text())["learner"]["classes"] == 8
    assert not (tmp_path / "tokenizer").exists()
    result = json.loads((tmp_path / "evals" / "accuracy" / "2.json").read_text())
    assert 0 <= result["top1"] <= result["top5"] <= 1


def test_positions_of_teachers_are_resampled_like_those_of_their_students():
    positions = np.arange(32.0).reshape(4, 8)
    stats = {"parts/distill/teacher/encoder/positions": positions, "teacher/center": positions}
    weights = warm_start.PretrainedWeights({"encoder/positions": positions}, stats, "a run")
    found = weights.for_images(toy.config(data__image_size=24))  # 3 x 3 patches of 8 pixels
    (student,) = found.params.values()
    teacher, other = found.stats.values()
    assert student.shape == (9, 8) and np.array_equal(student, teacher)
    assert other is positions


def test_arrays_that_do_not_fit_are_named(workdir):
    c, weights = warm_start.resolve(toy.config(encoder=str(workdir), **SMALL))
    c.model.mlp = 48
    init, *_ = toy.prepared(c)
    with pytest.raises(
        UserError, match=r"has encoder/blocks/mlp/.* name an encoder that fits the config"
    ):
        weights.put(init())


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "encoder: is empty"), ("/no/such/encoder", "/no/such/encoder"), (None, "no checkpoint")],
)
def test_an_encoder_that_is_not_there(path, message, workdir, tmp_path):
    if path is None:
        path = tmp_path
        (path / "checkpoints").mkdir()
        (path / "config.json").write_bytes((workdir / "config.json").read_bytes())
    with pytest.raises(UserError, match=message):
        warm_start.resolve(evaluation(path))


def test_an_encoder_alone_learns_nothing():
    c = toy.config()
    c.learner = learners.defaults("encoder")
    learner = learners.build(c, 0, jax.random.key(0))
    with pytest.raises(UserError, match="set total_steps=0 to evaluate"):
        learner.loss({}, jax.random.key(0), train=True)
