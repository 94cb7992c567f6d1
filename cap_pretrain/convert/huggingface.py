"""Import of folders that `transformers` writes: a config.json and weights."""

import dataclasses
from pathlib import Path
from typing import Any

from cap_pretrain.convert import clip, siglip, vit
from cap_pretrain.convert.encoder import Form, Pretrained, assemble
from cap_pretrain.convert.family import Family
from cap_pretrain.convert.weights import open_folder as open_weights
from cap_pretrain.convert.weights import read_json
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models.sizes import Size

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

FAMILIES: dict[str, Family] = {  # by `model_type` in config.json
    "clip": clip.FAMILY,
    "clip_vision_model": clip.FAMILY,
    "siglip": siglip.FAMILY,
    "siglip_vision_model": siglip.FAMILY,
    "vit": vit.FAMILY,
}

DEFAULTS = {  # of transformers, for fields that config.json of any family may omit
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "image_size": 224,
    "num_channels": 3,
}

ACTIVATIONS = {  # names in transformers, and ours
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}


def open_folder(folder: Path) -> Pretrained:
    """Read the vision encoder of such a folder; see `convert.open_encoder`."""
    where = folder / CONFIG
    config = read_json(where)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type is {kind!r}, which is not supported."
            f"{did_you_mean(str(kind), FAMILIES)}"
        )
    family = FAMILIES[kind]
    vision = DEFAULTS | dict(family.defaults)
    if kind in ("clip", "siglip"):
        for section in ("vision_config", "vision_config_dict"):  # the second of old CLIP configs
            vision |= config.get(section) or {}
    else:
        vision |= config
    options, names = family.describe(vision)
    act = vision["hidden_act"]
    if act not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act {act!r} is unknown.{did_you_mean(act, ACTIVATIONS)}")
    if vision["num_channels"] != 3:
        raise UserError(f"{where}: num_channels is {vision['num_channels']}, it must be 3.")
    patch = _side(where, vision, "patch_size")
    form = Form(
        Size(
            width=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            mlp=vision["intermediate_size"],
            heads=vision["num_attention_heads"],
        ),
        patch=patch,
        # Pixels beyond the last whole patch are ignored, such as 6 of 384 with patches of 14.
        image_size=_side(where, vision, "image_size") // patch * patch,
        options=dataclasses.replace(
            options, activation=ACTIVATIONS[act], norm_eps=vision["layer_norm_eps"]
        ),
    )
    mean, std = normalization(folder, family)
    classes = config.get("architectures") or [f"{family.name} encoder"]
    return assemble(
        form,
        open_weights(folder, *WEIGHTS).without(family.prefix),
        names,
        ignored=family.ignored,
        mean=mean,
        std=std,
        source=f"{classes[0]} of transformers",
    )


def normalization(folder: Path, family: Family) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the per-channel mean and standard deviation of a folder's preprocessing, in [0, 1]."""
    settings: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        settings = read_json(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():
        settings = read_json(folder / "processor_config.json").get("image_processor") or {}
    # The normalization is of pixels in 0 to 255 times the factor.
    unit = (
        255 * settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 255
    )
    if not settings.get("do_normalize", True):
        return (0.0,) * 3, (1 / unit,) * 3
    mean, std = settings.get("image_mean", family.mean), settings.get("image_std", family.std)
    return tuple(m / unit for m in mean), tuple(s / unit for s in std)


def _side(where: Path, config: dict[str, Any], field: str) -> int:
    """Return the side of a square, given as a number or as two equal ones."""
    value = config[field]
    sides = set(value if isinstance(value, list) else [value])
    if len(sides) > 1:
        raise UserError(f"{where}: {field} is {value}; only squares can be read.")
    return sides.pop()
