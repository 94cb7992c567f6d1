"""BatchNorm, stems, image sizes and sharding, beyond the parity tests of convert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from cap_pretrain import learners
from cap_pretrain.convert import export, open_encoder
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.models import build
from cap_pretrain.models.convnet import BatchNorm, convolved, max_pool
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.training import plan
from cap_pretrain.validation import validate
from tests import layouts, tiny, toy
from tests.parity import require


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_batch_norm_is_torchs(dtype):
    torch = require("torch")
    x = np.random.default_rng(0).normal(3, 2, (3, 2, 2, 5)).astype(dtype)
    theirs, ours = torch.nn.BatchNorm2d(5), BatchNorm(5, rngs=nnx.Rngs(0))
    images = torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)
    tolerance = dict(atol=1e-5 if dtype == np.float32 else 3e-2)
    for _ in range(3):  # twelve values per channel: the unbiased variance is 9% larger
        expected = theirs(images).detach().permute(0, 2, 3, 1)
        found = ours(jnp.asarray(x), train=True)
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(np.float32), expected, **tolerance)
        np.testing.assert_allclose(ours.mean[...], theirs.running_mean, rtol=1e-5)
        np.testing.assert_allclose(ours.var[...], theirs.running_var, rtol=1e-5)
    expected = theirs.eval()(images).detach().permute(0, 2, 3, 1)
    before = np.array(ours.mean[...])
    for frozen in (False, True):
        ours.frozen = frozen
        found = ours(jnp.asarray(x), train=frozen).astype(np.float32)
        np.testing.assert_allclose(found, expected, **tolerance)
        np.testing.assert_array_equal(ours.mean[...], before)


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_a_convolution_onto_a_small_map_is_a_convolution(side, stride):
    """Test forward and backward passes, with kernels smaller and larger than the map."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, side, side, 3)), rng.normal(size=(3, 3, 3, 4))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    how = ((stride, stride), ((1, 1), (1, 1)))
    names = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    expected, back = jax.vjp(lambda *a: jax.lax.conv_general_dilated(*a, *how, **names), x, kernel)
    found, our_back = jax.vjp(lambda *a: convolved(*a, *how, **names), x, kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for ours, theirs in zip(our_back(expected), back(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("padding", [0, 1])
def test_max_pooling_is_flaxs_and_equals_share_a_gradient(padding):
    pads = ((padding, padding),) * 2
    x = np.random.default_rng(0).normal(size=(2, 9, 6, 3)).astype(np.float32)
    expected, back = jax.vjp(lambda x: nnx.max_pool(x, (3, 3), (2, 2), pads), x)
    found, our_back = jax.vjp(lambda x: max_pool(x, padding=padding), x)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(our_back(expected)[0], back(expected)[0], rtol=1e-6)
    share = jax.grad(lambda x: jnp.sum(max_pool(x)))(jnp.ones((1, 3, 3, 1)))
    assert np.sum(share) == 1 and np.max(share) <= 0.25


@pytest.mark.parity
@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_in_training_output_and_statistics_are_those_of_torch(name, tmp_path):
    torch = require("torch")
    from tests import torch_convnets
    from tests.convert.test_torchvision import MEAN, STD, close, imported, rows
    from tests.convert.torch_models import pixels

    model = torch_convnets.make(name)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    images = tiny.images(6, side=48)

    def run(encoder, images):
        out = encoder(normalize_images(images, np.float32), train=True)
        return out.tokens, nnx.to_pure_dict(nnx.state(encoder, nnx.BatchStat))

    graphdef, params, stats = imported(open_encoder(tmp_path))
    tokens, stats = tiny.jitted((graphdef, params, stats), run)(images)
    close(tokens, rows(model.train()(pixels(images, MEAN, STD))[-1]))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    moved = open_encoder(tmp_path).stats
    for ours, theirs in zip(jax.tree.leaves(stats), jax.tree.leaves(moved), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"name": "resnet18"}, 2 * 2),
        ({"name": "resnet18", "stem": "small"}, 8 * 8),
        ({"name": "alexnet"}, 1),
    ],
)
def test_any_size_of_image_and_half_precision(fields, tokens):
    c = toy.config("encoder", dtype="bfloat16", **{f"model__{k}": v for k, v in fields.items()})
    graphdef, params, stats = tiny.abstract(c)

    def run(params, stats, images):
        return nnx.merge(graphdef, params, stats).encoder(images)

    for height, width in ((64, 64), (65, 100)):
        images = jax.ShapeDtypeStruct((2, height, width, 3), np.float32)
        out = jax.eval_shape(run, params, stats, images)
        assert out.tokens.dtype == out.pooled.dtype == jnp.bfloat16
        assert out.pooled.shape[0] == 2 and out.tokens.shape[2] == out.pooled.shape[1]
        if height == width:
            assert out.tokens.shape[1] == tokens


@pytest.mark.parametrize(("name", "width"), [("resnet18", 8 * 16), ("resnet50", 4 * 8 * 16)])
def test_a_resnet_of_another_width(name, width):
    c = toy.config("encoder", model__name=name, model__width=16)
    graphdef, params, stats = tiny.abstract(c)
    encoder = nnx.merge(graphdef, params, stats).encoder
    assert encoder.width == build.encoder_width(c) == width
    assert encoder.stem.conv.kernel.shape == (7, 7, 3, 16)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), np.float32)
    out = jax.eval_shape(
        lambda p, s, x: nnx.merge(graphdef, p, s).encoder(x), params, stats, images
    )
    assert out.pooled.shape == (2, width)


@pytest.mark.parametrize("name", ["resnet18", "alexnet"])
def test_kernels_are_split_by_their_channels_out(name):
    _, params, _ = tiny.abstract(toy.config("encoder", model__name=name))
    mesh = jax.sharding.AbstractMesh((1, 8, 1), ("data", "fsdp", "tensor"))
    shardings = sharding.param_shardings(params, mesh)

    def check(leaf, sharding):
        assert sharding.spec == P(*(None,) * (leaf.ndim - 1), "fsdp")

    jax.tree.map(check, params, shardings)


# Multiply-adds for an image of 224 pixels, as published by torchvision for its ResNet-18.
MULTIPLY_ADDS = 1.814e9


def test_flops_are_those_published_and_a_frozen_encoder_has_no_backward_pass():
    c = toy.config("classifier", {"classes": 1000}, model__name="resnet18", data__image_size=224)
    learning = plan.flops_per_example(c, 0)
    assert learning["forward"] == pytest.approx(2 * MULTIPLY_ADDS, rel=2e-3)
    assert learning["training"] == pytest.approx(3 * learning["forward"], rel=0.1)
    c.optim.lr_rules = (("encoder/.*", 0.0),)
    frozen = plan.flops_per_example(c, 0)
    assert frozen["training"] == pytest.approx(frozen["forward"], rel=2e-3)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "resnet-50"}, "model.name: no size 'resnet-50'. Did you mean 'resnet50'"),
        ({"name": "resnet18", "pool": "map"}, "model.pool: 'map' is for a ViT, but model.name is"),
        ({"name": "resnet18", "depth": 3}, "model.depth: 3 is for a ViT"),
        ({"name": "alexnet", "width": 64}, "model.width: 64 is for a ViT"),
        ({"name": "resnet18", "stem": "smal"}, "model.stem: 'smal' is unknown. Did you .*'small'"),
        ({"name": "alexnet", "stem": "small"}, "model.stem: 'small' is for a ResNet"),
        ({"name": "mu/8", "stem": "small"}, "model.stem: 'small' is for a ResNet"),
        ({"name": "alexnet"}, "data.image_size: 16 is too small for alexnet; use 63 or more"),
        ({"name": "resnet18", "decoder_heads": 3}, "model.decoder_heads: 3 does not divide"),
    ],
)
def test_fields_that_do_not_go_together_are_told(fields, said):
    with pytest.raises(UserError, match=said) as error:
        validate(toy.config(**{f"model__{k}": v for k, v in fields.items()}))
    assert len(str(error.value).splitlines()) == 1


def steps_on(layout):
    """Return the losses of two steps, and the statistics of the last BatchNorm after them."""
    c = toy.config(
        model__name="resnet18",
        model__stem="small",
        optim__name="adamw",
        batch_size=16,
        data__image_size=8,
        model__decoder_depth=1,
        model__decoder_width=32,
        model__decoder_mlp=64,
        model__decoder_heads=2,
    )
    training = layouts.Training(c, layout)
    state, losses = training.go_on(training.init(), 2)
    norm = state.stats["encoder"]["stage_4"]["block_2"]["unit_2"]["norm"]
    return [losses, *(np.asarray(norm[name]).tolist() for name in ("mean", "var"))]


@pytest.mark.slow
def test_statistics_are_of_the_batch_of_all_devices():
    one, other = layouts.on_eight_devices(steps_on, [("one",), ("all",)])
    for ours, expected in zip(other, one, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)


def test_a_classifier_reads_a_layer_as_wide_as_it_is():
    options = {"classes": 6, "layer": "stage_2"}
    _, params, _ = tiny.abstract(toy.config("classifier", options, model__name="resnet18"))
    assert params["head"]["kernel"].shape == (128, 6)
    with pytest.raises(UserError, match="the encoder has no layer 'stage_5'. Did you mean"):
        tiny.abstract(
            toy.config("classifier", options | {"layer": "stage_5"}, model__name="resnet18")
        )


def test_what_is_no_vit_is_not_exported():
    with pytest.raises(UserError, match="model.name: resnet18 is not a SiglipVisionModel"):
        export.form(toy.config(model__name="resnet18"))


def test_what_is_frozen_is_told_module_by_module():
    rules = (("encoder/(stem|stage_1|stage_2/block_1)/.*", 0.0),)
    c = toy.config(model__name="resnet18", optim__lr_rules=rules)
    encoder = nnx.eval_shape(lambda: learners.build(c, tiny.VOCAB, jax.random.key(0))).encoder
    assert not encoder.frozen
    norms = {p: m.frozen for p, m in nnx.iter_modules(encoder) if isinstance(m, BatchNorm)}
    for path, frozen in norms.items():
        assert frozen == (path[0] in ("stem", "stage_1") or path[:2] == ("stage_2", "block_1"))
    assert sum(norms.values()) == 1 + 4 + 3
