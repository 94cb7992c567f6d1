"""Imported encoders compute the same as the originals; unreadable input is reported."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain import config as configs
from cap_pretrain import naflex, rules
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.convert import dual, encoder, open_encoder
from cap_pretrain.errors import UserError
from tests import tiny
from tests.convert import torch_models
from tests.convert.torch_models import PATCH, SIDE, TEXT, VISION
from tests.parity import require

torch, transformers = require("torch"), require("transformers")
safetensors = require("safetensors.torch")

pytestmark = pytest.mark.parity


def clip():
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION)
    return transformers.CLIPModel(config)


def siglip(**fields):
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, **fields))


def siglip_pair():
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    return transformers.SiglipModel(config)


def vit_classifier():
    config = transformers.ViTConfig(**VISION, qkv_bias=False, hidden_act="gelu_new")
    return transformers.ViTForImageClassification(config)


def dinov2(registers=0, **fields):
    fields = {k: v for k, v in VISION.items() if k != "intermediate_size"} | fields
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**fields, num_register_tokens=registers)
        return transformers.Dinov2WithRegistersModel(config)
    return transformers.Dinov2Model(transformers.Dinov2Config(**fields, mlp_ratio=2))


def dinov3(registers=0, **fields):
    config = transformers.DINOv3ViTConfig(**VISION, num_register_tokens=registers, **fields)
    return transformers.DINOv3ViTModel(config)


def aimv2(**fields):
    return transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**VISION, **fields))


def aimv2_pair():
    config = transformers.Aimv2Config(text_config=TEXT, vision_config=VISION)
    return transformers.Aimv2Model(config)


# Each with a function that returns its vision model.
MODELS = {
    "CLIPModel": (clip, lambda model: model.vision_model),
    "CLIPVisionModel": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
        lambda model: model,
    ),
    "SiglipModel": (siglip_pair, lambda model: model.vision_model),
    "SiglipVisionModel": (siglip, lambda model: model),
    "SiglipVisionModel without a head": (
        lambda: siglip(vision_use_head=False),
        lambda model: model,
    ),
    "ViTModel": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**VISION)),
        lambda model: model,
    ),
    "Dinov2Model": (dinov2, lambda model: model),
    "Dinov2WithRegistersModel": (lambda: dinov2(3), lambda model: model),
    "Dinov2Model with a gate": (lambda: dinov2(use_swiglu_ffn=True), lambda model: model),
    "Dinov2WithRegistersModel with a gate": (
        lambda: dinov2(3, use_swiglu_ffn=True),
        lambda model: model,
    ),
    "DINOv3ViTModel": (dinov3, lambda model: model),
    "DINOv3ViTModel with registers": (lambda: dinov3(4, rope_theta=50.0), lambda model: model),
    "DINOv3ViTModel with a gate": (
        lambda: dinov3(use_gated_mlp=True, hidden_act="silu", query_bias=False, mlp_bias=False),
        lambda model: model,
    ),
    "Aimv2Model": (aimv2_pair, lambda model: model.vision_model),
    "Aimv2VisionModel": (aimv2, lambda model: model),
    "Aimv2VisionModel without a head": (lambda: aimv2(use_head=False), lambda model: model),
    "Aimv2VisionModel, native": (lambda: aimv2(is_native=True), lambda model: model),
    "Aimv2VisionModel with biases": (lambda: aimv2(qkv_bias=True), lambda model: model),
    "Aimv2VisionModel with biases of MLPs": (lambda: aimv2(mlp_bias=True), lambda model: model),
    "ViTForImageClassification": (vit_classifier, lambda model: model.vit),
}


def expected(vision, images, pretrained):
    """Return tokens and pooled vector, computed by torch."""
    out = vision(torch_models.pixels(images, pretrained.mean, pretrained.std))
    tokens = out.last_hidden_state
    if isinstance(vision, transformers.ViTModel):
        return tokens, tokens[:, 0]  # the pooler is not part of the encoder
    return tokens, tokens.mean(1) if out.pooler_output is None else out.pooler_output


def test_dinov2_sees_images_of_other_sizes_as_there(tmp_path):
    model = torch_models.randomised(dinov2(image_size=40))
    torch_models.save(model, tmp_path)
    config = configs.default()
    with config.unlocked():
        weights = warm_start.from_import(config, tmp_path, tmp_path, print)
    for side in (24, 64):
        config.data.image_size = side
        found = weights.for_images(config).params["encoder/positions"]
        tokens = torch.zeros(1, (side // VISION["patch_size"]) ** 2 + 1, VISION["hidden_size"])
        theirs = model.embeddings.interpolate_pos_encoding(tokens, side, side)
        np.testing.assert_allclose(found, theirs[0, 1:], atol=1e-5)


@pytest.mark.parametrize("make", [lambda: dinov3(2), lambda: aimv2(is_native=True)])
def test_models_with_computed_positions_see_other_images_as_there(make, tmp_path):
    model = torch_models.randomised(make())
    pretrained = open_encoder(torch_models.save(model, tmp_path))
    assert "positions" not in pretrained.params
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 40, 3), np.uint8)
    tokens, _ = expected(model, images, pretrained)
    np.testing.assert_allclose(torch_models.encode(pretrained, images).tokens, tokens, atol=1e-4)
    packed = np.stack([naflex.packed(image, PATCH, budget=12) for image in images])
    found = torch_models.encode(pretrained, packed).tokens[:, : tokens.shape[1], :-1]
    np.testing.assert_allclose(found, tokens, atol=1e-4)


def test_registers_that_the_config_does_not_have_are_not_left_out(tmp_path):
    torch_models.save(dinov3(2), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_register_tokens": 0}))
    with pytest.raises(UserError, match="as class_token it would be .3, 64. instead of .1, 64."):
        open_encoder(tmp_path)


def test_the_pooling_of_an_imported_aimv2_can_be_trained(tmp_path):
    pretrained = open_encoder(torch_models.save(torch_models.randomised(aimv2()), tmp_path))
    images = tiny.images(3, side=SIDE)

    def total(params, images):
        own = dataclasses.replace(pretrained, params=params)
        return jnp.sum(jnp.sin(torch_models.encode(own, images).pooled))

    params, gradient = pretrained.params, jax.grad(total)(pretrained.params, images)["head"]
    assert np.any(gradient["mlp"]["down"]["kernel"])
    stepped = jax.tree.map(lambda p, g: p - 0.1 * g, params["head"], gradient)
    gradient = jax.grad(total)(params | {"head": stepped}, images)["head"]
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("case", MODELS)
def test_a_model_of_transformers_computes_the_same(case, tmp_path):
    make, vision = MODELS[case]
    model = torch_models.randomised(make())
    pretrained = open_encoder(torch_models.save(model, tmp_path))
    assert pretrained.image_size == SIDE and type(model).__name__ in pretrained.source
    assert (case == "Aimv2Model") == ("no gated MLPs" in dual.read(tmp_path, pretrained)[1])
    images = tiny.images(3, side=SIDE)
    tokens, pooled = expected(vision(model), images, pretrained)
    out = torch_models.encode(pretrained, images)
    assert np.abs(tokens.numpy()).max() > 1
    np.testing.assert_allclose(out.tokens, tokens, atol=1e-4)
    np.testing.assert_allclose(out.pooled, pooled, atol=1e-4)


def test_shards_and_half_precision_are_read_as_what_they_hold(tmp_path):
    model = torch_models.randomised(siglip()).bfloat16()
    whole = open_encoder(torch_models.save(model, tmp_path / "whole"))
    shards = torch_models.save(model, tmp_path / "shards", max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    for (path, array), other in zip(flat(whole), flat(open_encoder(shards)), strict=True):
        assert array.dtype == np.float32 and array.tobytes() == other[1].tobytes(), path


def flat(pretrained):
    return rules.flatten(pretrained.params).items()


def test_folding_the_normalisation_changes_nothing_but_rounding():
    rng = np.random.default_rng(0)
    kernel, bias = rng.standard_normal((4 * 4 * 3, 7)), rng.standard_normal(7)
    mean, std = (0.48, 0.45, 0.40), (0.26, 0.27, 0.28)
    unit = rng.random((5, 4 * 4, 3))
    before = ((unit - mean) / std).reshape(5, -1) @ kernel + bias
    folded, shifted = encoder.fold_normalization(kernel, bias, mean, std)
    assert folded.dtype == shifted.dtype == np.float32
    np.testing.assert_allclose((2 * unit - 1).reshape(5, -1) @ folded + shifted, before, atol=1e-5)


def test_preprocessing_is_read_from_the_folder(tmp_path):
    torch_models.save(siglip(), tmp_path)

    def read(**settings):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        pretrained = open_encoder(tmp_path)
        return pretrained.mean[0], pretrained.std[0]

    assert read() == (0.5, 0.5)
    assert read(image_mean=[0.4] * 3, image_std=[0.2] * 3) == (0.4, 0.2)
    assert read(do_normalize=False) == (0, 1)
    assert read(rescale_factor=1 / 127.5, image_mean=[1.0] * 3, image_std=[1.0] * 3) == (0.5, 0.5)


def test_defaults_that_published_configs_leave_out_are_those_of_transformers():
    from cap_pretrain.convert import huggingface

    for kind, config in (
        ("clip", transformers.CLIPVisionConfig()),
        ("siglip", transformers.SiglipVisionConfig()),
        ("vit", transformers.ViTConfig()),
        ("dinov3_vit", transformers.DINOv3ViTConfig()),
        ("aimv2_vision_model", transformers.Aimv2VisionConfig()),
    ):
        defaults = huggingface.DEFAULTS | dict(huggingface.FAMILIES[kind].defaults)
        assert defaults == {k: getattr(config, k) for k in defaults}


def test_the_second_section_of_old_clip_configs_counts(tmp_path):
    torch_models.save(clip(), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["vision_config_dict"] = config.pop("vision_config")
    config["vision_config"] = {"hidden_size": 9, "image_size": 9}
    path.write_text(json.dumps(config))
    assert open_encoder(tmp_path).model["width"] == VISION["hidden_size"]


class Hostile:
    """Code that unpickling would execute."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["pickle", "torch", "folder"])
def test_a_hostile_pickle_is_refused_and_not_executed(kind, tmp_path):
    trap, path = tmp_path / "executed", tmp_path / "weights.pt"
    content = {"visual.conv1.weight": torch.zeros(1), "more": Hostile(trap)}
    if kind == "folder":
        model = tmp_path / "model"
        torch_models.save(siglip(), model)
        (model / "model.safetensors").unlink()
        torch.save(content, model / "pytorch_model.bin")
        path = model
    elif kind == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match="holds more than tensors, or is corrupt, and was not read"):
        open_encoder(path)
    assert not trap.exists()


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-B-32.pt")
    with pytest.raises(UserError, match="(?s)TorchScript archive, a program.*torch.jit.load"):
        open_encoder(tmp_path / "ViT-B-32.pt")


def changed(folder, change):
    """Rewrite the weights of a folder."""
    tensors = safetensors.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def without_a_bias(tensors):
    del tensors["encoder.layers.1.mlp.fc1.bias"], tensors["head.attention.in_proj_weight"]


def with_an_adapter(tensors):
    tensors["encoder.layers.0.adapter.weight"] = torch.zeros(2)


def with_a_wide_layer(tensors):
    tensors["encoder.layers.2.mlp.fc1.weight"] = torch.zeros(81, 64)


def of_another_model(tensors):
    tensors.clear()
    tensors["roberta.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_bias, "lacks encoder.layers.1.mlp.fc1.bias, head.attention.in_proj_weight.$"),
        (with_an_adapter, "has the unknown encoder.layers.0.adapter.weight.$"),
        (with_a_wide_layer, r"layers.2.mlp.fc1.weight has the shape \[81, 64\], which does not"),
        (of_another_model, "lacks .* and 58 more, and has the unknown roberta.weight"),
    ],
)
def test_missing_and_unknown_weights_are_named(change, message, tmp_path):
    torch_models.save(siglip(), tmp_path)
    changed(tmp_path, change)
    with pytest.raises(UserError, match=message) as error:
        open_encoder(tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "siglp"},
            "model_type is 'siglp', which is not supported.*Did you mean 'siglip'",
        ),
        ({"hidden_act": "relu6"}, "hidden_act 'relu6' is unknown"),
        ({"num_channels": 1}, "num_channels is 1, it must be 3"),
        ({"image_size": [24, 32]}, r"image_size is \[24, 32\]; only squares"),
    ],
)
def test_unsupported_config_fields_are_named(fields, message, tmp_path):
    torch_models.save(siglip(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UserError, match=message):
        open_encoder(tmp_path)


def test_missing_and_corrupt_files_are_reported(tmp_path):
    with pytest.raises(UserError, match="is not a file, nor a folder with a config.json"):
        open_encoder("openai/clip-vit-base-patch32")
    with pytest.raises(UserError, match="has neither a config.json"):
        open_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        open_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="has no weights; it needs one of model.safetensors, "):
        open_encoder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"<html>")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        open_encoder(tmp_path)
    safetensors.save_file(
        {"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.safetensors"
    )
    with pytest.raises(UserError, match="no ViT in the layout of OpenAI's CLIP.*it holds layer1"):
        open_encoder(tmp_path / "resnet.safetensors")
