"""Sweeps: trials, recovery of power laws, tables and pivots by hand, costs of a run."""

import json
import shutil

import numpy as np
import pytest

from cap_pretrain import config as configs
from cap_pretrain.checkpoints.manifest import make_manifest
from cap_pretrain.errors import UserError
from cap_pretrain.sweeps import power_law, results, trials
from cap_pretrain.sweeps.trials import Trial
from cap_pretrain.telemetry import tables
from cap_pretrain.training import plan
from cap_pretrain.validation import validate
from tests import tiny, toy

SWEEPS = toy.CONFIGS / "sweeps"
QUICKSTART = str(toy.CONFIGS / "quickstart.py")


@pytest.fixture
def root(monkeypatch):
    """Run in the root of the repository, which trials' config files are relative to."""
    monkeypatch.chdir(toy.CONFIGS.parent)


@pytest.mark.parametrize(
    ("sweep", "count"),
    [
        ("recurrent.py", 5 * 4 * 5),
        ("recurrent.py:size=toy,batches=8+16,rates=0.1,layers=1+2+3", 2 * 3),
        ("recurrent.py:recipe=rotation_lstm,rates=0.1", 5 * 5),
        ("scaling.py", 4 * 4 * 2),
        ("scaling.py:sizes=S/16+B/16,scenes=full,rates=0.1+0.2", 2 * 4 * 2 * 2),
        ("ablations.py", 5 * 2),
        ("ablations.py:what=depth,values=1+2,seeds=3,data=data/coco,size=S/16", 2),
        ("ablations.py:what=width", 3 * 2),
        ("ablations.py:what=tokens", 5 * 2),
        ("ablations.py:what=read", 5 * 2),
        ("ablations.py:what=patch,seeds=0", 5),
        ("objectives.py:what=cap/cappa_small_first,seeds=3+4,size=32x1", 4),
    ],
)
def test_every_trial_has_a_valid_config_of_its_own(root, sweep, count):
    found = trials.load(f"{SWEEPS}/{sweep}", {})
    assert len(found) == count
    assert len({str(trial.fields) for trial in found}) == count
    for trial in (found[0], found[-1]):
        validate(trial.resolved())


def test_a_recurrent_trial_is_the_recipe_but_for_what_is_swept(root):
    trial = trials.load(f"{SWEEPS}/recurrent.py:batches=64,rates=0.005,layers=3", {"seed": 7})[0]
    config = toy.load("recurrent", "recipe=cnn_lstm")
    config.batch_size, config.optim.lr, config.learner.layers, config.seed = 64, 0.005, 3, 7
    config.total_epochs = 5.0  # the number that the recipe's source uses
    assert trial.resolved() == config
    assert trial.fields["recipe"] == "cnn_lstm" and trial.fields["optim.lr"] == 0.005
    assert "--config.optim.lr=0.005" in trial.arguments("x")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"optim.rl": 1}, "no field 'optim.rl'"),
        ({"batch_size": "many"}, "batch_size='many'"),
        ({"no.such": 1}, "no field 'no.such'"),
    ],
)
def test_overrides_that_do_not_fit_are_told(fields, told):
    with pytest.raises(UserError, match=f"trial a: {told}"):
        Trial("a", QUICKSTART, fields).resolved()


def test_sweep_files_that_are_wrong_are_told(tmp_path):
    file = tmp_path / "sweep.py"
    head = "from cap_pretrain.sweeps.trials import Trial\ndef sweep(arg=None):\n    yield from "
    for body, told in {
        "()": "has no trials",
        "[Trial('a', 'x'), Trial('a', 'y')]": "2 trials are called 'a'",
        "[Trial('a/b', 'x')]": "is not a valid trial name",
    }.items():
        file.write_text(head + body)
        with pytest.raises(UserError, match=told):
            trials.load(str(file), {})
    with pytest.raises(UserError, match="there is no file .*swep.py'. Did you mean .*sweep.py"):
        trials.load(str(tmp_path / "swep.py"), {})
    with pytest.raises(UserError, match=r"has no function sweep\(\)"):
        trials.load(QUICKSTART, {})


def test_extra_overrides_are_values():
    assert trials.parse_overrides(
        ["--config.optim.lr=1e-3", "--config.data.flip=True", "--config.data.name=data/coco=2"]
    ) == {"optim.lr": 1e-3, "data.flip": True, "data.name": "data/coco=2"}
    with pytest.raises(UserError, match="expected --config.some.field=value after --"):
        trials.parse_overrides(["--workdir=x"])


@pytest.mark.parametrize("offset", [0.0, 1.5])
def test_a_power_law_is_found_again(offset):
    x = np.geomspace(1e4, 1e8, 9)
    law = power_law.fit(x, 40 * x**-0.3 + offset, offset=bool(offset))
    np.testing.assert_allclose([law.a, law.b, law.c], [40, 0.3, offset], rtol=1e-4)
    np.testing.assert_allclose(law([2e5]), 40 * 2e5**-0.3 + offset, rtol=1e-6)


@pytest.mark.parametrize("offset", [False, True])
def test_bands_hold_what_is_true_as_often_as_they_say(offset):
    x = np.repeat(np.geomspace(1e3, 1e6, 5), 2)
    true = 20 * x**-0.4 + (0.3 if offset else 0)
    rng, held, curve_held, tries = np.random.default_rng(0), 0, 0, 60
    for _ in range(tries):
        law = power_law.fit(x, true * np.exp(0.03 * rng.standard_normal(len(x))), offset=offset)
        low, high = law.b_band
        held += low < 0.4 < high
        low, high = law.band(x)
        curve_held += np.mean((low < true) & (true < high))
    assert 0.85 <= held / tries <= 1
    assert 0.85 <= curve_held / tries <= 1


def test_a_band_is_that_of_linear_regression():
    x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    y = np.array([9.0, 7.0, 4.0, 3.5, 2.0])
    (slope, _), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    half = 3.182446 * covariance[0, 0] ** 0.5  # Student's t of 97.5%, three degrees of freedom
    law = power_law.fit(x, y)
    np.testing.assert_allclose(law.b_band, [-slope - half, -slope + half], rtol=1e-6)


def test_a_frontier_is_what_no_cheaper_point_beats():
    points = [(4, 2.0), (1, 5.0), (2, 5.0), (2, 3.0), (3, 3.5), (9, 2.0)]
    assert power_law.frontier(points) == [(1, 5.0), (2, 3.0), (4, 2.0)]


def test_what_has_no_law_is_told():
    with pytest.raises(UserError, match="needs as many different x, not 1"):
        power_law.fit([2, 2, 2], [1, 2, 3])
    with pytest.raises(UserError, match="positive"):
        power_law.fit([1, 2, 3], [1, 0, 3])
    two = power_law.fit([1, 2], [4, 2])
    assert two.b == pytest.approx(1) and two.b_band == (-np.inf, np.inf)
    assert "too few points" in str(two)


@pytest.fixture
def swept(tmp_path):
    """Four trials and a second seed of the first; the last had a lower loss earlier."""
    found = []
    for lr, layers, seed, losses in [
        (0.1, 1, 0, [3.0, 2.0]),
        (0.1, 1, 1, [3.0, 1.0]),
        (0.1, 2, 0, [3.0, 0.5]),
        (0.01, 1, 0, [3.0, None]),
        (0.01, 2, 0, [0.25, 4.0]),
    ]:
        name = f"lr={lr}_layers={layers}_seed={seed}"
        fields = {"optim.lr": lr, "learner.layers": layers, "seed": seed, "batch_size": 8}
        found.append(Trial(name, "configs/quickstart.py", fields))
        (tmp_path / name).mkdir()
        lines = [{"step": n, "val/loss": loss} for n, loss in enumerate(losses)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    return found, tmp_path


def test_a_row_a_trial_with_what_differs(swept):
    rows = results.rows(*swept, ["val/loss", "val/loss:min"])
    assert list(rows[0]) == [
        *("trial", "optim.lr", "learner.layers", "seed", "val/loss", "val/loss:min")
    ]
    assert [row["val/loss"] for row in rows] == [2.0, 1.0, 0.5, 3.0, 4.0]
    assert [row["val/loss:min"] for row in rows] == [2.0, 1.0, 0.5, 3.0, 0.25]
    errors = results.rows(*swept, ["1-val/loss:max"])
    assert [row["1-val/loss:max"] for row in errors] == [-1.0, 0.0, 0.5, -2.0, 0.75]
    best = results.ordered(rows, "-val/loss:min")
    assert [row["val/loss:min"] for row in best] == [3.0, 2.0, 1.0, 0.5, 0.25]
    for wrong, told in {"val/los": "mean 'val/loss'", "val/loss:mean": "none of last"}.items():
        with pytest.raises(UserError, match=told):
            results.rows(*swept, [wrong])
    with pytest.raises(UserError, match="--sort: there is no column 'los'"):
        results.ordered(rows, "los")


def test_pivots(swept):
    rows = results.rows(*swept, ["val/loss"])
    assert results.pivot(rows, "optim.lr", "learner.layers", "val/loss") == [
        {"optim.lr": 0.01, "learner.layers=1": 3.0, "learner.layers=2": 4.0},
        {"optim.lr": 0.1, "learner.layers=1": 1.5, "learner.layers=2": 0.5},  # the mean of seeds
    ]
    # Another field that differs is a column; combinations that were not run are empty.
    assert results.pivot(rows, "learner.layers", "seed", "val/loss") == [
        {"optim.lr": 0.01, "learner.layers": 1, "seed=0": 3.0, "seed=1": None},
        {"optim.lr": 0.01, "learner.layers": 2, "seed=0": 4.0, "seed=1": None},
        {"optim.lr": 0.1, "learner.layers": 1, "seed=0": 2.0, "seed=1": 1.0},
        {"optim.lr": 0.1, "learner.layers": 2, "seed=0": 0.5, "seed=1": None},
    ]
    # A field that they determine is not a column.
    wide = [row | {"width": 10 * row["learner.layers"]} for row in rows]
    assert results.pivot(wide, "width", "optim.lr", "val/loss") == [
        {"width": 10, "optim.lr=0.01": 3.0, "optim.lr=0.1": 1.5},
        {"width": 20, "optim.lr=0.01": 4.0, "optim.lr=0.1": 0.5},
    ]
    with pytest.raises(UserError, match="--pivot: there is no column 'batch_size'"):
        results.pivot(rows, "batch_size", "seed", "val/loss")


def test_how_far_a_trial_is_that_was_started_by_hand(tmp_path):
    trial = Trial("a", QUICKSTART)
    assert results.status(trial, tmp_path, False) == ("waiting", 0, 0, None, "")
    config = trial.resolved()
    config.total_steps, config.total_epochs, config.data.scenes.length_train = 0, 0.5, 1280
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text(configs.to_json(config))
    metrics = tmp_path / "a" / "metrics.jsonl"
    metrics.write_text('{"step": 9, "time/eta_s": 2.5}\n{"step": 9, "val/loss": 1}\n')
    assert results.status(trial, tmp_path, False) == ("begun", 9, 10, 2.5, "")
    metrics.write_text('{"step": 10, "time/eta_s": 0.0}\n')
    assert results.status(trial, tmp_path, False) == ("finished", 10, 10, None, "")


def test_tables_are_written_in_every_format():
    rows = [{"a": "x", "b": 1 / 3}, {"a": "y", "c": 20_000}]
    assert tables.written(rows, "markdown").splitlines() == [
        "| a | b | c |",
        "| --- | --- | --- |",
        "| x | 0.3333 |  |",
        "| y |  | 20000 |",
    ]
    assert tables.written(rows, "csv").splitlines() == [
        "a,b,c",
        "x,0.3333333333333333,",
        "y,,20000",
    ]
    assert json.loads(tables.written(rows, "json"))[1] == {"a": "y", "b": None, "c": 20_000}
    assert tables.written(rows, "text").splitlines()[2].split() == ["x", "0.3333"]


def test_what_a_run_took(tmp_path, tokenizer_path, monkeypatch):
    config = tiny.config()
    (tmp_path / "config.json").write_text(configs.to_json(config))
    (tmp_path / "tokenizer").mkdir()
    shutil.copyfile(tokenizer_path, tmp_path / "tokenizer" / "tokenizer.model")
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "train/loss": 1}\n')
    monkeypatch.setattr(plan, "flops_per_example", lambda config, vocab: {"training": vocab + 0.5})
    counted = plan.count_parameters(tiny.abstract(config, vocab=100)[1])
    costs = results.costs(tmp_path)
    assert costs["parameters"] == counted["total"]
    assert costs["parameters/encoder"] == counted["encoder"]
    assert (costs["examples"], costs["flops"]) == (24, 24 * 100.5)
    monkeypatch.delattr(plan, "flops_per_example")  # counts are cached
    assert results.costs(tmp_path) == costs
    manifest = tmp_path / "checkpoints" / "2" / "manifest" / "metadata"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps(make_manifest(2, {}, {}, [[0, 4], [1, 8]])))
    assert results.costs(tmp_path)["examples"] == 4 + 2 * 8  # another batch size from step 1 on
    with pytest.raises(UserError, match="is not the folder of a run"):
        results.costs(tmp_path / "nothing")
