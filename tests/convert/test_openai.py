"""Weights in the layouts of OpenAI and OpenCLIP are read as the model of transformers."""

import json

import numpy as np
import pytest

from cap_pretrain.convert import dual, open_encoder
from cap_pretrain.errors import UserError
from tests import tiny
from tests.convert import torch_models
from tests.convert.torch_models import SIDE, TEXT, VISION
from tests.parity import require

torch, transformers = require("torch"), require("transformers")
safetensors = require("safetensors.torch")

pytestmark = pytest.mark.parity


def openai_state(model):
    """Return the weights of a CLIPModel under the names in OpenAI's code."""
    vision = {
        k.removeprefix("vision_model."): v
        for k, v in model.state_dict().items()
        if k.startswith("vision_model.")
    }
    state = {
        "conv1.weight": vision["embeddings.patch_embedding.weight"],
        "class_embedding": vision["embeddings.class_embedding"],
        "positional_embedding": vision["embeddings.position_embedding.weight"],
        "proj": model.visual_projection.weight.T.contiguous(),
    }
    for ours, theirs in (("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")):
        state |= {f"{ours}.{leaf}": vision[f"{theirs}.{leaf}"] for leaf in ("weight", "bias")}
    for layer in range(VISION["num_hidden_layers"]):
        block, source = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for leaf in ("weight", "bias"):
            state[f"{block}attn.in_proj_{leaf}"] = torch.cat(
                [vision[f"{source}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            )
            for ours, theirs in (
                ("attn.out_proj", "self_attn.out_proj"),
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                state[f"{block}{ours}.{leaf}"] = vision[f"{source}{theirs}.{leaf}"]
    text = {
        "token_embedding.weight": torch.zeros(3, 2),
        "positional_embedding": torch.zeros(3, 2),
        "transformer.resblocks.0.ln_1.weight": torch.zeros(2),
        "ln_final.weight": torch.zeros(2),
        "text_projection": torch.zeros(2, 2),
        "logit_scale": torch.zeros(()),
    }
    return {f"visual.{k}": v for k, v in state.items()} | text


@pytest.fixture(scope="module")
def openai_model():
    """Return a CLIP with the head width of OpenAI's, and its state dict in their layout."""
    wide = VISION | {"hidden_size": 128, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=wide)
    model = torch_models.randomised(transformers.CLIPModel(config))
    return model, openai_state(model)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "training", "open_clip"])
def test_openais_layout_computes_the_same_in_any_file(kind, openai_model, tmp_path):
    model, state = openai_model
    path = tmp_path / "clip.pt"
    if kind == "safetensors":
        path = tmp_path / "clip.safetensors"
        safetensors.save_file(state, path)
    elif kind == "pt":
        torch.save(state | {"token_embedding.weight": torch.zeros(2, 2)}, path)
    elif kind == "training":
        state = {f"module.{k}": v for k, v in state.items()}
        torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, path)
    else:
        path = tmp_path
        safetensors.save_file(state, path / "open_clip_model.safetensors")
        vision = {"image_size": SIDE, "layers": 3, "width": 128, "patch_size": 8, "head_width": 64}
        config = {"model_cfg": {"quick_gelu": True, "vision_cfg": vision}}
        (path / "open_clip_config.json").write_text(json.dumps(config))
    pretrained = open_encoder(path)
    if kind == "pt":
        assert "text tower is left out, as weights alone" in dual.read(path, pretrained)[1]
    images = tiny.images(3, side=SIDE)
    expected = model.vision_model(torch_models.pixels(images, pretrained.mean, pretrained.std))
    out = torch_models.encode(pretrained, images)
    np.testing.assert_allclose(out.tokens, expected.last_hidden_state, atol=1e-4)
    np.testing.assert_allclose(out.pooled, expected.pooler_output, atol=1e-4)


def test_openclips_config_says_what_the_weights_do_not(openai_model, tmp_path):
    _, state = openai_model
    safetensors.save_file(state, tmp_path / "open_clip_model.safetensors")

    def opened(vision=None, **fields):
        config = {"model_cfg": {"vision_cfg": vision or {}, **fields}, "preprocess_cfg": {}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        return open_encoder(tmp_path).model

    assert opened()["activation"] == "gelu"
    assert opened(quick_gelu=True)["activation"] == "quick_gelu"
    assert opened({"head_width": 32, "ls_init_value": None})["heads"] == 4
    with pytest.raises(UserError, match="its vision encoder has timm_model_name; only the plain"):
        opened({"timm_model_name": "vit"})
