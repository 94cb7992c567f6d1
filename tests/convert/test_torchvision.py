"""Imported ResNets and AlexNet compute the same as in torch; unreadable input is reported."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from cap_pretrain import learners, rules
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.convert import open_encoder
from cap_pretrain.errors import UserError
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.training.step import split_learner
from tests import tiny, torch_convnets, toy
from tests.convert.torch_models import pixels
from tests.parity import require

torch = require("torch")
safetensors = require("safetensors.torch")

pytestmark = pytest.mark.parity

SLOW = pytest.mark.slow
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imported(pretrained):
    """Return the encoder's graph, and its parameters and statistics."""
    c = toy.config("encoder", **{f"model__{k}": v for k, v in pretrained.model.items()})
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_encoder(c, nnx.Rngs(0))))
    return graphdef, pretrained.params, pretrained.stats


def rows(maps):
    """Convert a torch tensor [B, D, H, W] to tokens [B, H * W, D]."""
    return maps.flatten(2).transpose(1, 2).numpy()


def close(ours, theirs):
    """Compare within 1e-4 of the largest value, since values grow with depth."""
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1, np.abs(theirs).max()))


@pytest.mark.parametrize(
    ("name", "side", "small"),
    [
        ("resnet18", 40, False),
        ("resnet18", 16, True),
        ("alexnet", 70, False),
        pytest.param("resnet34", 64, False, marks=SLOW),
        pytest.param("resnet50", 64, False, marks=SLOW),
        pytest.param("resnet101", 72, False, marks=SLOW),
        pytest.param("resnet152", 64, False, marks=SLOW),
    ],
)
def test_tokens_of_every_layer_and_the_pooled_vector_are_those_of_torch(
    name, side, small, tmp_path
):
    model = torch_convnets.make(name, small)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    pretrained = open_encoder(tmp_path / "weights.pth")
    assert pretrained.model["name"] == name and pretrained.image_size is None
    images = tiny.images(2, side=side)

    def run(encoder, images):
        x = normalize_images(images, np.float32)
        return encoder(x), {name: encoder.tokens_at(name, x) for name in encoder.layers}

    split = imported(pretrained)
    out, layers = tiny.jitted(split, run)(images)
    maps = model(pixels(images, MEAN, STD))
    for found, theirs in zip(layers.values(), maps, strict=False):
        close(found, rows(theirs))
    close(out.tokens, rows(maps[-1]))
    close(out.pooled, maps[-1].mean((2, 3)).numpy())
    encoder = nnx.merge(*split)
    assert {n: t.shape[-1] for n, t in layers.items()} == encoder.layers
    assert out.pooled.shape[-1] == encoder.width


def layouts(state):
    """Return file contents that hold a state dict of ResNet-18, by file name."""
    trunk = {f"_feature_blocks.{k}": v for k, v in state.items() if not k.startswith("fc.")}
    whole = {f"trunk.{k}": v for k, v in trunk.items()} | {"heads.0.clf.0.weight": torch.ones(2, 2)}
    model = {"trunk": trunk, "heads": {"0.clf.0.weight": torch.ones(2, 2)}}
    vissl = {"phase_idx": 3, "classy_state_dict": {"base_model": {"model": model, "meters": {}}}}
    training = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    return {
        "torchvision.pth": state,
        "old.pth": old,
        "training.pth": training,
        "vissl.torch.pt": vissl,
        "vissl_model.pt": whole,
        "model.safetensors": state,
    }


def test_a_state_dict_is_read_from_any_file_that_people_keep_it_in(tmp_path):
    state = torch_convnets.make("resnet18").state_dict()
    first = None
    for name, content in layouts(state).items():
        folder = tmp_path / name
        folder.mkdir()
        save = safetensors.save_file if name.endswith("safetensors") else torch.save
        save(content, folder / name)
        pretrained = open_encoder(folder)  # the only file in it
        whole = {"params": pretrained.params, "stats": pretrained.stats}
        toy.assert_same(first or whole, whole)
        first = first or whole
        left = {"vissl.torch.pt": "", "vissl_model.pt": ", without its heads"}
        assert pretrained.source == "resnet18 under torchvision's names" + left.get(
            name, ", without its fc"
        )
    assert len(rules.flatten(first["stats"])) == 2 * 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer3.1.bn2.running_var"), "lacks layer3.1.bn2.running_var.$"),
        (lambda s: s.update({"layer1.0.se.weight": s["fc.bias"]}), "unknown layer1.0.se.weight.$"),
        (lambda s: s.update({"layer2.2.conv1.weight": s["fc.bias"]}), "2, 3, 2, 2 blocks, which"),
        (
            lambda s: s.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}),
            r"conv1.weight has the shape \[64, 1, 7, 7\], which does not fit",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message, tmp_path):
    state = torch_convnets.make("resnet18").state_dict()
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message) as error:
        open_encoder(tmp_path / "weights.pth")
    assert len(str(error.value).splitlines()) == 1


def test_a_run_begins_with_its_statistics_and_on_images_of_any_size(tmp_path):
    model = torch_convnets.make("resnet18", small=True)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    fields = {"model__pool": "map", "data__image_size": 24, "encoder": str(tmp_path)}
    c, beginning = warm_start.resolve(toy.config("classifier", {"classes": 3}, **fields))
    assert (c.model.name, c.model.stem, c.model.pool) == ("resnet18", "small", "gap")
    assert c.data.image_size == 24
    state = beginning.put(tiny.state(c, optax.identity()))
    norm = state.stats["encoder"]["stage_4"]["block_2"]["unit_2"]["norm"]
    np.testing.assert_array_equal(norm["mean"], model.layer4[1].bn2.running_mean)
    np.testing.assert_array_equal(norm["var"], model.layer4[1].bn2.running_var)
    kernel = state.params["encoder"]["stem"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, model.conv1.weight.permute(2, 3, 1, 0))


# Including the classifier of 1000 classes; as published by torchvision for each model.
COUNTS = {
    "resnet18": (11_689_512, 9_600),
    "resnet34": (21_797_672, 17_024),
    "resnet50": (25_557_032, 53_120),
    "resnet101": (44_549_160, 105_344),  # 44,654,504 in total
    "resnet152": (60_192_808, 151_424),
}


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=SLOW if n in ("resnet34", "resnet152") else ()) for n in COUNTS],
)
def test_parameters_and_statistics_are_as_many_as_published(name):
    c = toy.config("classifier", {"classes": 1000}, model__name=name)
    _, params, stats = tiny.abstract(c)
    assert (count(params), count(stats)) == COUNTS[name]


def test_alexnet_is_all_that_is_before_its_classifier():
    _, params, stats = tiny.abstract(toy.config("encoder", model__name="alexnet"))
    classifier = 9216 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    assert count(params) == 61_100_840 - classifier and not stats


def test_clips_vit_b_32_has_as_many_parameters_as_the_published_one():
    transformers = require("transformers")
    with torch.device("meta"):
        theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig())
    fields = dict(pool="class", class_token=True, pre_norm=True, final_norm="pooled")
    c = toy.config("encoder", model__name="B/32", data__image_size=224)
    c.model.update(fields)
    learner = nnx.eval_shape(lambda: learners.build(c, 0, jax.random.key(0)))
    # 87,849,216 includes the projection to 512, which is not imported. Our ViT has a bias in the
    # patch embedding, and no position embedding of the class token.
    ours = count(split_learner(learner)[1])
    assert ours == sum(p.numel() for p in theirs.parameters()) == 87_849_216 - 768 * 512
