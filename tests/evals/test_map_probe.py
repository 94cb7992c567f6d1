"""The attentive probe: its head against torch, what it can tell apart, its choice, its limits."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Interrupted
from cap_pretrain.evals.metrics import classification
from cap_pretrain.evals.probes import attentive
from cap_pretrain.evals.probes.features import Labelled
from cap_pretrain.evals.probes.map_probe import MapProbe, Tokens
from cap_pretrain.models import native
from cap_pretrain.models.compute import Compute
from cap_pretrain.models.mlp import Details
from cap_pretrain.models.sizes import Size
from cap_pretrain.models.vit import MapHead
from tests import tiny
from tests.evals.labelled import Coloured, context
from tests.layouts import on_eight_devices

SIZE = Size(width=16, depth=1, mlp=40, heads=4)
TRAIN, TEST = Coloured(160, 4, clear=90), Coloured(52, 4, seed=1, clear=90)
FAST = {"lr": (3e-3,), "weight_decay": (0.01, 0.3), "epochs": 1.0, "fit_batch": 32}


def random_head(seed=0):
    """Return the parameters of a head, without any at their initial zeros and ones."""
    rng = np.random.default_rng(seed)
    head = attentive._copies(1, SIZE, 3, seed)
    return jax.tree.map(lambda p: np.float32(p[0] + 0.3 * rng.standard_normal(p[0].shape)), head)


def tokens(count=5, length=7, seed=0):
    return np.random.default_rng(seed).standard_normal((count, length, 16)).astype(np.float32)


@pytest.mark.slow
def test_a_head_is_map_head_and_a_linear_layer():
    params, x = random_head(), tokens()
    head = MapHead(SIZE, details=Details(), compute=Compute(), rngs=nnx.Rngs(0))
    own = {name: part for name, part in params.items() if name != "linear"}
    nnx.update(head, nnx.State(own))
    expected = head(x) @ params["linear"]["kernel"] + params["linear"]["bias"]
    np.testing.assert_allclose(attentive.logits(params, x, SIZE.heads), expected, atol=1e-5)


@pytest.mark.parity
@pytest.mark.slow
def test_a_head_is_that_of_torch():
    import torch

    params, x = random_head(), torch.tensor(tokens())

    def tensor(array):
        return torch.tensor(np.asarray(array))

    def linear(part, y):
        return torch.nn.functional.linear(y, tensor(part["kernel"]).T, tensor(part["bias"]))

    attention = torch.nn.MultiheadAttention(16, SIZE.heads, batch_first=True)
    parts = [params["attention"][name] for name in ("query", "key", "value")]
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([tensor(p["kernel"]).T for p in parts]))
        attention.in_proj_bias.copy_(torch.cat([tensor(p["bias"]) for p in parts]))
        attention.out_proj.weight.copy_(tensor(params["attention"]["out"]["kernel"]).T)
        attention.out_proj.bias.copy_(tensor(params["attention"]["out"]["bias"]))
        query = tensor(params["probe"]).expand(len(x), 1, 16)
        y = attention(query, x, x, need_weights=False)[0][:, 0]
        scale, bias = (tensor(params["norm"][name]) for name in ("scale", "bias"))
        z = torch.nn.functional.layer_norm(y, (16,), scale, bias, eps=1e-6)
        z = torch.nn.functional.gelu(linear(params["mlp"]["up"], z), approximate="tanh")
        expected = linear(params["linear"], y + linear(params["mlp"]["down"], z))
    got = attentive.logits(params, x.numpy(), SIZE.heads)
    np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def hidden(count, seed, length=12):
    """Return tokens of which one, at a random place, shows the class; the mean shows nothing.

    That one is marked, and has the sign of the class; the sum of all signs is zero.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, length, 16)).astype(np.float32)
    labels = rng.integers(0, 2, count).astype(np.int32)
    place = rng.integers(0, length, count)
    rows, sign = np.arange(count), 2.0 * labels - 1
    x[..., 0], x[..., 1] = 0, 0
    x[rows, place, 0] = 3
    x[rows, place, 1], x[rows, (place + 1) % length, 1] = 3 * sign, -3 * sign
    return Labelled(x.astype(np.float16), labels)


def test_it_tells_apart_what_the_mean_of_the_tokens_does_not():
    train, test = hidden(512, 0), hidden(200, 1)
    settings = [attentive.Setting(3e-3, 0.01), attentive.Setting(1e-9, 0.0)]
    scale = attentive.scale_of(train.features, train.features.shape[-1])
    steps = []
    heads = attentive.Heads(scale, SIZE, 2, settings, seed=0)
    rows = np.arange(len(train.labels))
    heads.fit(train, rows, steps=150, batch_size=128, each=steps.append)
    learned, idle = heads.scores(test.features, 64)
    assert (learned.argmax(1) == test.labels).mean() > 0.97
    assert np.abs(idle).max() < 1e-3 and steps == list(range(1, 151))
    some = np.arange(len(test.labels))[::-2]
    found = heads.scores(test.features, 64, some)[0]
    np.testing.assert_array_equal(found, learned[some])
    means = train.features.mean(1, dtype=np.float32)
    direction = means[train.labels == 1].mean(0) - means[train.labels == 0].mean(0)
    by_mean = (test.features.mean(1, dtype=np.float32) - means.mean(0)) @ direction > 0
    assert (by_mean == test.labels).mean() < 0.65


def test_every_row_is_drawn_once_before_any_is_drawn_again():
    rows = np.array([2, 3, 5, 7, 11])
    batches = attentive.shuffled(rows, 3, seed=1)
    drawn = np.concatenate([next(batches) for _ in range(5)]).reshape(3, 5)
    assert (np.sort(drawn, axis=1) == rows).all() and (drawn[0] != drawn[1]).any()
    np.testing.assert_array_equal(next(attentive.shuffled(rows, 3, seed=1)), drawn[0, :3])


def test_the_scale_is_that_of_all_tokens_and_leaves_constants_alone(monkeypatch):
    monkeypatch.setattr(attentive, "_CHUNK", 4)
    x = tokens() * 5 + 3
    x[..., 2] = 0.1
    scale = attentive.scale_of(x, x.shape[-1])
    rows = x.reshape(-1, 16).astype(np.float64)
    np.testing.assert_allclose(scale.mean, rows.mean(0), rtol=1e-5)
    others = np.arange(16) != 2
    np.testing.assert_allclose(scale.deviation[others], rows.std(0)[others], rtol=1e-5)
    assert scale.deviation[2] == 1


def test_padding_does_not_count():
    x = tokens()
    noise = np.random.default_rng(0).standard_normal((len(x), 3, 16)).astype(x.dtype)
    real = np.concatenate([np.ones(x.shape[:2], bool), np.zeros(noise.shape[:2], bool)], axis=1)
    padded = np.asarray(native.marked(np.concatenate([x, noise], axis=1), real))
    for own, other in zip(attentive.scale_of(x, 16), attentive.scale_of(padded, 16), strict=True):
        np.testing.assert_array_equal(own, other)
    params = random_head()
    found = attentive.logits(params, padded, 4)
    np.testing.assert_allclose(found, attentive.logits(params, x, 4), atol=1e-5)


@pytest.fixture
def few_steps(monkeypatch):
    monkeypatch.setattr(attentive, "LEAST_STEPS", 25)


@pytest.mark.slow
def test_it_chooses_on_held_out_images_and_tests_once(few_steps):
    made, variables = context(TRAIN, Coloured(52, 4, seed=1, clear=90, broken=(3,)))
    probe = MapProbe(made, MapProbe.Options(layer="pixels", **FAST))
    result = probe(variables)
    details = result.details
    assert details["train_images"] == 160 and details["chosen_on_images"] == 16
    assert details["images"] == 51 and details["dimensions"] == 64 and details["tokens"] == 16
    tried = details["held_out_top1_by_setting"]
    assert [pair[:2] for pair in tried] == [(3e-3, 0.3), (3e-3, 0.01)]
    best = max(tried, key=lambda t: t[2])
    assert (result.metrics["lr"], result.metrics["weight_decay"]) == best[:2]
    assert result.metrics["held_out_top1"] == best[2]
    # The final head, by its parts.
    (train, test) = (
        Tokens(made, s, layer="pixels", batch_size=64)(variables) for s in (TRAIN, TEST)
    )
    scale = attentive.scale_of(train.features, train.features.shape[-1])
    setting = attentive.Setting(*best[:2])
    heads = attentive.Heads(scale, probe._size(), 4, [setting], seed=0)
    heads.fit(train, np.arange(160), steps=25, batch_size=32, each=lambda _: None)
    scores = np.delete(heads.scores(test.features, 32)[0], 3, axis=0)
    expected = classification.metrics(scores, np.delete(test.labels, 3))
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert expected["top1"] > 0.5


def test_pixels_are_patches_with_their_positions_and_work_is_counted():
    made, variables = context(TRAIN, TEST)
    found = Tokens(made, TEST, layer="pixels", batch_size=64)(variables)
    assert found.features.shape == (52, 16, 64) and found.features.dtype == np.float16
    image = TEST[7]["image"] / 255  # 16 x 16 pixels already
    np.testing.assert_allclose(found.features[7, 6, :48], image[4:8, 8:12].ravel(), atol=1e-3)
    np.testing.assert_array_equal(found.features[7, :, 48:], np.eye(16))
    # The work counts the fits, too.
    work = MapProbe(made, MapProbe.Options(**FAST)).work()
    least = work.passes(212) - 212  # of 500 steps each
    assert least > 1000 and work.passes(424) - 424 == least
    # One epoch of 1.6 million training images in batches of 32.
    expected = least * 1.6e6 / 32 / attentive.LEAST_STEPS
    assert work.passes(2120000) - 2120000 == pytest.approx(expected)


@pytest.mark.slow
def test_training_images_are_drawn_where_memory_is_short_and_classes_may_be_missing(few_steps):
    class Fewer(Coloured):
        """Images of the first two of four classes, named as if there were no others."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.class_names = ["a", "b"]

    made, variables = context(Fewer(160, 2), TEST)
    one = FAST | {"weight_decay": (0.01,)}
    memory = 40 * 16 * 16 * 2 / 1e9
    result = MapProbe(made, MapProbe.Options(layer="block_2", memory_gb=memory, **one))(variables)
    assert result.details["train_images"] == 40 and result.details["chosen_on"] is None
    assert result.details["images_of_untrained_classes"] == 26
    assert result.metrics["top1"] <= 0.5 and "held_out_top1" not in result.metrics
    assert any(
        line.startswith("trained on 40 training images, drawn at random") for line in result.lines
    )
    broken = Coloured(40, 4, broken=range(40))
    nothing = dataclasses.replace(made, sources=made.sources | {"val": broken})
    with pytest.raises(UserError, match="has no image with a label that can be decoded"):
        MapProbe(nothing, MapProbe.Options(layer="pixels", **one))(variables)
    stopping = dataclasses.replace(made, stop=lambda: True)
    with pytest.raises(Interrupted):
        MapProbe(stopping, MapProbe.Options(**one))(variables)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr": ()}, "map_probe.lr"),
        ({"weight_decay": (-1.0,)}, "map_probe.weight_decay"),
        ({"epochs": 0.0}, "map_probe.epochs: 0.0"),
        ({"layer": "pooled"}, "map_probe.layer: 'pooled' is one vector"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        MapProbe.Options(**options)


def metrics_of(shape, batch_size):
    """Return the metrics on a mesh, with parameters sharded as in training."""
    c = tiny.config()
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = shape
    mesh = sharding.make_mesh(c, jax.devices()[: math.prod(shape)])
    made, (params, stats) = context(TRAIN, TEST, mesh=mesh)
    variables = jax.device_put(params, sharding.param_shardings(params, mesh)), stats
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        jax.set_mesh(mesh),
        jax.transfer_guard("disallow"),
    ):
        monkeypatch.setattr(attentive, "LEAST_STEPS", 25)
        result = MapProbe(made, MapProbe.Options(batch_size=batch_size, **FAST))(variables)
    return [result.metrics, result.details]


@pytest.mark.slow
def test_metrics_are_identical_on_eight_devices_and_with_any_batch_size():
    one, eight = on_eight_devices(metrics_of, [((1, 1, 1), 30), ((2, 2, 2), 300)])
    assert one == eight and one[0]["top1"] > 0.3
