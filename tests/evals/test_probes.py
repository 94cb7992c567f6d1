"""Probes against NumPy and scikit-learn, and on different meshes."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.metrics import classification
from cap_pretrain.evals.probes import few_shot, knn, probing
from cap_pretrain.evals.probes.features import Features
from cap_pretrain.evals.probes.few_shot import FewShot
from cap_pretrain.evals.probes.knn import KNearestNeighbours
from cap_pretrain.evals.probes.linear_probe import LinearProbe
from tests import tiny
from tests.evals.labelled import Coloured, context
from tests.layouts import on_eight_devices

TRAIN, TEST = Coloured(160, 4), Coloured(52, 4, seed=1)
GRID = (1e-3, 1e-2, 0.1, 1.0)


def blobs(n, classes=3, d=8, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int32) % classes
    centres = np.random.default_rng(9).standard_normal((classes, d))
    return np.float32(centres[labels] + rng.standard_normal((n, d)) + 1), labels


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A context with cached features for the whole module, and its variables."""
    return context(TRAIN, TEST, workdir=tmp_path_factory.mktemp("run"))


def regression(c, features, labels):
    """Return the logistic regression of scikit-learn."""
    model = LogisticRegression(C=c, solver="newton-cholesky", tol=1e-9)
    return model.fit(features.astype(np.float64), labels)


def features_of(probed, source, layer="pooled"):
    made, variables = probed
    return Features(made, source, layer=layer, batch_size=64)(variables)


def test_linear_probe_is_scikit_learns_at_the_c_it_has_chosen(probed):
    made, variables = probed
    result = LinearProbe(made, LinearProbe.Options(c=GRID))(variables)
    train, test = features_of(probed, TRAIN), features_of(probed, TEST)
    held = np.zeros(160, bool)
    held[probing.held_out(train.labels, seed=0)] = True
    assert np.bincount(train.labels[held]).tolist() == [4, 4, 4, 4]

    def fitted(c, rows):
        return regression(c, train.features[rows], train.labels[rows])

    by_c = {c: fitted(c, ~held).score(train.features[held], train.labels[held]) for c in GRID}
    assert dict(result.details["held_out_top1_by_c"]) == pytest.approx(by_c)
    best = max(GRID, key=lambda c: (by_c[c], -c))
    assert result.metrics["c"] == best and result.metrics["held_out_top1"] == by_c[best]
    final = fitted(best, slice(None))
    assert result.metrics["top1"] == pytest.approx(final.score(*test))
    assert result.metrics["train_top1"] == pytest.approx(final.score(*train))
    right = final.predict(test.features) == test.labels
    by_class = [right[test.labels == k].mean() for k in range(4)]
    assert result.metrics["mean_per_class"] == pytest.approx(np.mean(by_class))
    assert result.details["converged"]
    assert result.details["train_images"] == 160 and result.details["chosen_on_images"] == 16
    assert result.details["images"] == 52 and result.details["dimensions"] == 16


def test_a_split_may_choose_and_is_not_learned_from(probed):
    made, variables = probed
    small, validation = Coloured(140, 4), Coloured(20, 4, seed=2)
    made = dataclasses.replace(made, sources={"train": small, "val": TEST, "v": validation})
    result = LinearProbe(made, LinearProbe.Options(c=GRID, validation_split="v"))(variables)
    assert result.details["chosen_on"] == "v"
    assert result.details["chosen_on_images"] == 20 and result.details["train_images"] == 140
    train, val, test = (features_of((made, variables), s) for s in (small, validation, TEST))
    by_c = {c: regression(c, *train).score(*val) for c in GRID}
    assert dict(result.details["held_out_top1_by_c"]) == pytest.approx(by_c)
    final = regression(result.metrics["c"], *train)
    assert result.metrics["train_top1"] == pytest.approx(final.score(*train))
    assert result.metrics["top1"] == pytest.approx(final.score(*test))


def test_a_c_at_the_end_of_the_grid_is_told(probed):
    made, variables = probed
    result = LinearProbe(made, LinearProbe.Options(c=(1e-6, 1e-5)))(variables)
    assert "is at an end of the values tried" in result.lines[0]
    result = LinearProbe(made, LinearProbe.Options(c=(1e-5,)))(variables)  # nothing is chosen
    assert result.lines == () and result.details["chosen_on"] is None
    assert result.metrics["c"] == 1e-5 and "held_out_top1" not in result.metrics


def test_neighbours_tell_classes_apart_that_can_be(probed):
    made, variables = probed
    result = KNearestNeighbours(made, KNearestNeighbours.Options(layer="pixels"))(variables)
    assert result.metrics["top1"] > 0.9 and result.details["dimensions"] == 768


def test_neighbours_vote_as_in_numpy():
    (train, labels), (test, _) = blobs(60), blobs(25, seed=1)
    temperature = 0.3
    got = knn.votes(train, labels, test, np.float32(temperature), k=7, classes=3)

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    cosines = unit(test.astype(np.float64)) @ unit(train.astype(np.float64)).T
    for row, votes in zip(cosines, got, strict=True):
        nearest = np.argsort(-row)[:7]
        weights = np.exp(row[nearest] / temperature)
        expected = [weights[labels[nearest] == k].sum() for k in range(3)]
        np.testing.assert_allclose(votes, np.array(expected) / weights.sum(), atol=1e-5)


def test_neighbours_in_chunks_are_the_same(monkeypatch):
    (train, labels), (test, _) = blobs(61), blobs(26, seed=1)
    whole = knn.votes(train, labels, test, np.float32(0.1), k=5, classes=3)
    monkeypatch.setattr(knn, "CHUNK", 61 * 7)
    knn.votes.clear_cache()
    parts = knn.votes(train, labels, test, np.float32(0.1), k=5, classes=3)
    knn.votes.clear_cache()
    np.testing.assert_allclose(whole, parts, atol=1e-6)


@pytest.mark.parametrize("shots", [2, 6])  # fewer and more examples than features
@pytest.mark.parametrize("l2", [0.01, 30.0])
def test_ridge_is_that_of_scikit_learn(shots, l2):
    (train, labels), (test, _) = blobs(3 * shots), blobs(25, seed=1)
    got = few_shot.predict(few_shot.ridge(train, labels, classes=3), test, np.float32(l2))
    mean, deviation = train.mean(0), train.std(0) + 1e-5
    model = Ridge(alpha=l2).fit((train - mean) / deviation, 2 * np.eye(3)[labels] - 1)
    np.testing.assert_allclose(got, model.predict((test - mean) / deviation), atol=2e-3)


def test_few_shot_draws_shots_and_chooses_without_the_test_split(probed):
    made, variables = probed
    options = FewShot.Options(shots=(1, 5), draws=3, l2=(1.0, 64.0, 4096.0))
    result = FewShot(made, options)(variables)
    for shots in (1, 5):
        found = result.details["by_shots"][shots]
        assert found["shots_in_all"] == 4 * shots and found["held_out_images"] == 16
        assert len(found["top1"]) == 3
        assert result.metrics[f"top1_{shots}shot"] == pytest.approx(np.mean(found["top1"]))
        assert result.metrics[f"top1_{shots}shot_std"] == pytest.approx(np.std(found["top1"]))
        by_l2 = dict(found["held_out_top1_by_l2"])
        assert by_l2[found["l2"]] == max(by_l2.values())
    assert len(set(result.details["by_shots"][5]["top1"])) > 1
    fixed = FewShot(made, FewShot.Options(shots=(1, 5), draws=3, l2=(64.0,)))(variables)
    assert fixed.details["chosen_on"] is None
    assert fixed.details["by_shots"][5]["held_out_images"] == 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LinearProbe.Options(c=()), "linear_probe.c"),
        (lambda: LinearProbe.Options(c=(0.0, 1.0)), "linear_probe.c"),
        (lambda: KNearestNeighbours.Options(k=0), "knn.k: 0"),
        (lambda: FewShot.Options(shots=(0,)), "few_shot.shots"),
        (lambda: FewShot.Options(draws=0), "few_shot.draws"),
    ],
)
def test_options_that_cannot_be(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_what_is_not_a_number_is_never_right():
    scores = np.zeros((4, 8), np.float32)
    scores[0] = np.nan
    scores[1, 1:] = np.nan
    scores[2, 0] = np.nan
    scores[3, 0] = 1
    metrics = classification.metrics(scores, np.zeros(4, np.int32))
    assert metrics == {"top1": 0.25, "top5": 0.25, "mean_per_class": 0.25}


def test_too_few_images_to_hold_out_any():
    made, variables = context(Coloured(8, 4), TEST)
    with pytest.raises(UserError, match="too few to hold out 10%.*validation_split"):
        LinearProbe(made, LinearProbe.Options(layer="pixels"))(variables)
    made, variables = context(Coloured(8, 1), Coloured(8, 1))
    with pytest.raises(UserError, match="needs two classes"):
        KNearestNeighbours(made, KNearestNeighbours.Options(layer="pixels"))(variables)


def all_metrics(shape: tuple[int, int, int], batch_size: int) -> dict[str, list[dict]]:
    """Return the metrics of every probe on a mesh, with parameters sharded as in training."""
    c = tiny.config()
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = shape
    mesh = sharding.make_mesh(c, jax.devices()[: math.prod(shape)])
    made, (params, stats) = context(TRAIN, TEST, mesh=mesh)
    variables = jax.device_put(params, sharding.param_shardings(params, mesh)), stats
    probes = {
        LinearProbe: {"c": GRID},
        KNearestNeighbours: {},
        FewShot: {"shots": (1, 5), "draws": 2, "l2": (1.0, 64.0)},
    }
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        results = {
            probe.__name__: probe(made, probe.Options(batch_size=batch_size, **options))(variables)
            for probe, options in probes.items()
        }
    return {name: [result.metrics, result.details] for name, result in results.items()}


@pytest.mark.slow  # by default only the features that they read are compared (test_features.py)
@pytest.mark.parametrize("mesh", [(2, 2, 2), (8, 1, 1)])
def test_metrics_are_identical_on_eight_devices_and_with_any_batch_size(mesh):
    one, eight = on_eight_devices(all_metrics, [((1, 1, 1), 30), (mesh, 300)])
    assert one == eight
    assert 0.3 < one["LinearProbe"][0]["top1"] < 1


@pytest.mark.parametrize("probe", [KNearestNeighbours, LinearProbe, FewShot])
def test_images_of_classes_without_training_images_are_counted_and_told(probe, probed):
    class Fewer(Coloured):
        """Images of the first two classes only."""

        def __getitem__(self, index):
            return super().__getitem__(index // 2)

    made, variables = probed
    made = dataclasses.replace(made, sources={"train": Fewer(80, 4), "val": TEST}, workdir=None)
    few = {"shots": (1,), "draws": 1, "l2": (1.0,)} if probe is FewShot else {}
    few |= {"c": (0.1,)} if probe is LinearProbe else {}
    result = probe(made, probe.Options(**few))(variables)
    assert result.details["untrained_classes"] == 2
    assert result.details["images_of_untrained_classes"] == 26
    assert (
        "26 of 52 test images count as wrong: their 2 classes have no training image (class 2, "
        "class 3)"
    ) in result.lines
