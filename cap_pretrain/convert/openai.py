"""Import of checkpoints in the layout of OpenAI's CLIP, which OpenCLIP writes, too."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cap_pretrain.convert import clip
from cap_pretrain.convert.encoder import (
    MAX_PIXEL,
    MAX_WIDTH,
    MIN_STD,
    Form,
    Pretrained,
    assemble,
    per_channel,
)
from cap_pretrain.convert.tables import Computed, Entry, Fused
from cap_pretrain.convert.weights import Weights, few, read_json
from cap_pretrain.convert.weights import open_folder as open_weights_of
from cap_pretrain.errors import UserError
from cap_pretrain.models.sizes import Size
from cap_pretrain.untrusted import bounded, checked

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

# Of OpenAI's CLIP (model.py): `vision_heads = vision_width // 64`, and torch's default epsilon.
HEAD_WIDTH = 64
NORM_EPS = 1e-5

_POSITIONS = "visual.positional_embedding"
_LAYER = "visual.transformer.resblocks.{}."
_NUMBER = _LAYER.replace(".", r"\.").format(r"(\d+)")

NAMES: dict[str, Entry] = {
    "patch_embedding": "visual.conv1",
    "patch_embedding/bias": None,
    "positions": Computed((_POSITIONS,), lambda positions: positions[1:]),
    "class_token": Computed(
        ("visual.class_embedding", _POSITIONS), lambda token, positions: token + positions[:1]
    ),
    "pre_norm": "visual.ln_pre",
    "blocks/norm1": _LAYER + "ln_1",
    "blocks/attention/query": Fused(_LAYER + "attn.in_proj", 0),
    "blocks/attention/key": Fused(_LAYER + "attn.in_proj", 1),
    "blocks/attention/value": Fused(_LAYER + "attn.in_proj", 2),
    "blocks/attention/out": _LAYER + "attn.out_proj",
    "blocks/norm2": _LAYER + "ln_2",
    "blocks/mlp/up": _LAYER + "mlp.c_fc",
    "blocks/mlp/down": _LAYER + "mlp.c_proj",
    "norm": "visual.ln_post",
}

IGNORED = (  # projection, text tower, and what OpenAI's archives hold besides weights
    *("visual.proj", "transformer.", "token_embedding.", "positional_embedding", "ln_final."),
    *("text_projection", "text.", "attn_mask", "logit_scale", "logit_bias"),
    *("input_resolution", "context_length", "vocab_size"),
)

# Fields of OpenCLIP's vision_cfg that the shapes of the weights imply, and the one they do not.
_IN_SHAPES = ("image_size", "layers", "width", "patch_size", "mlp_ratio")
_HEAD_WIDTH = "head_width"


def read(weights: Weights) -> Pretrained:
    """Read weights without a config, with OpenAI's activation; see `convert.open_encoder`."""
    return _read(weights, "quick_gelu", HEAD_WIDTH, clip.MEAN, clip.STD, "OpenAI's CLIP")


def open_folder(folder: Path) -> Pretrained:
    """Read the vision encoder of a folder of OpenCLIP; see `convert.open_encoder`."""
    where = folder / CONFIG

    def section(inside: dict[str, Any], name: str) -> dict[str, Any]:
        return checked(inside.get(name) or {}, name, dict, where)

    config = read_json(where)
    model, preprocessing = section(config, "model_cfg"), section(config, "preprocess_cfg")
    vision = section(model, "vision_cfg")
    quick = checked(model.get("quick_gelu") or False, "quick_gelu", bool, where)
    other = [k for k, v in vision.items() if v and k not in (*_IN_SHAPES, _HEAD_WIDTH)]
    if other:
        raise UserError(
            f"{where}: its vision encoder has {few(other)}; only the plain ViT of CLIP can be read."
        )
    return _read(
        open_weights_of(folder, *WEIGHTS),
        "quick_gelu" if quick else "gelu",
        bounded(vision.get(_HEAD_WIDTH, HEAD_WIDTH), _HEAD_WIDTH, 1, MAX_WIDTH, where),
        per_channel(preprocessing.get("mean", clip.MEAN), "mean", -MAX_PIXEL, where),
        per_channel(preprocessing.get("std", clip.STD), "std", MIN_STD, where),
        "CLIP of OpenCLIP",
    )


def _read(
    weights: Weights,
    activation: str,
    head_width: int,
    mean: Sequence[float],
    std: Sequence[float],
    source: str,
) -> Pretrained:
    """Derive the architecture from the shapes of the weights, and read them."""
    layers = {m[1] for name in weights.names if (m := re.match(_NUMBER, name))}
    if not layers or "visual.conv1.weight" not in weights.names:
        found = few(weights.names[:3]) or "nothing"
        raise UserError(
            f"{weights.where}: has no ViT in the layout of OpenAI's CLIP, with names as "
            "visual.transformer.resblocks.0.ln_1.weight, and no ResNet or AlexNet under "
            f"torchvision's names; it holds {found}."
        )
    width, _, _, patch = weights.shape("visual.conv1.weight", 4)
    (mlp,) = weights.shape(_LAYER.format(0) + "mlp.c_fc.bias", 1)
    positions, _ = weights.shape(_POSITIONS, 2)
    grid = math.isqrt(max(positions - 1, 0))
    form = Form(
        Size(width=width, depth=len(layers), mlp=mlp, heads=width // head_width),
        patch=patch,
        image_size=grid * patch,
        options=dataclasses.replace(clip.OPTIONS, activation=activation, norm_eps=NORM_EPS),
    )
    return assemble(
        form,
        weights,
        NAMES,
        ignored=IGNORED,
        mean=mean,
        std=std,
        source=source,
    )
