"""Import of folders that `transformers` writes: a config.json and weights."""

import dataclasses
from pathlib import Path
from typing import Any

from cap_pretrain.convert import aimv2, clip, dinov2, dinov3, siglip, siglip2, vit
from cap_pretrain.convert.encoder import (
    MAX_DEPTH,
    MAX_GRID,
    MAX_HEADS,
    MAX_MLP,
    MAX_PATCH,
    MAX_PIXEL,
    MAX_WIDTH,
    MIN_STD,
    Form,
    Pretrained,
    assemble,
    per_channel,
)
from cap_pretrain.convert.family import Family
from cap_pretrain.convert.weights import open_folder as open_weights
from cap_pretrain.convert.weights import read_json
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models.sizes import Size
from cap_pretrain.models.vit import Options
from cap_pretrain.untrusted import bounded, checked, entry, shown

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

FAMILIES: dict[str, Family] = {  # by `model_type` in config.json
    "clip": clip.FAMILY,
    "clip_vision_model": clip.FAMILY,
    "siglip": siglip.FAMILY,
    "siglip_vision_model": siglip.FAMILY,
    "siglip2": siglip2.FAMILY,
    "siglip2_vision_model": siglip2.FAMILY,
    "vit": vit.FAMILY,
    "dinov2": dinov2.FAMILY,
    "dinov2_with_registers": dinov2.WITH_REGISTERS,
    "dinov3_vit": dinov3.FAMILY,
    "aimv2": aimv2.FAMILY,
    "aimv2_vision_model": aimv2.FAMILY,
}

DEFAULTS = {  # of transformers, for fields that config.json of any family may omit
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "image_size": 224,
    "num_channels": 3,
}

LIMITS = {
    "hidden_size": MAX_WIDTH,
    "num_hidden_layers": MAX_DEPTH,
    "intermediate_size": MAX_MLP,
    "num_attention_heads": MAX_HEADS,
}
"""Fields for a `Size`, and their largest values."""

FLAGS = {  # fields that are true or false
    *("qkv_bias", "query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"),
    *("vision_use_head", "use_head", "is_native", "use_swiglu_ffn", "use_gated_mlp"),
}

ACTIVATIONS = {  # names in transformers, and ours
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}


def open_folder(folder: Path) -> Pretrained:
    """Read the vision encoder of such a folder; see `convert.open_encoder`."""
    where = folder / CONFIG
    config = read_json(where)
    kind = entry(config, "model_type", str, where)
    if kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type is {shown(kind)}, which is not supported."
            f"{did_you_mean(kind[:80], FAMILIES)}"
        )
    family = FAMILIES[kind]
    vision = DEFAULTS | dict(family.defaults)
    if kind in ("clip", "siglip", "siglip2", "aimv2"):
        for section in ("vision_config", "vision_config_dict"):  # the second of old CLIP configs
            vision |= checked(config.get(section) or {}, section, dict, where)
    else:
        vision |= config
    vision = family.complete(vision, where)
    for name, most in (("patch_size", MAX_PATCH), ("image_size", MAX_PATCH * MAX_GRID)):
        vision[name] = _side(where, vision, name, most)
    for flag in FLAGS & vision.keys():
        entry(vision, flag, bool, where)
    options, names = family.describe(vision)
    mean, std = normalization(folder, family)
    found = assemble(
        _form(vision, options, where),
        open_weights(folder, *WEIGHTS).without(family.prefix),
        names,
        ignored=family.ignored,
        mean=mean,
        std=std,
        source=f"{_class(config) or f'{family.name} encoder'} of transformers",
    )
    return dataclasses.replace(found, resample=family.resample, layout=family.layout)


def _form(vision: dict[str, Any], options: Options, where: Path) -> Form:
    """Return the architecture that the config of a vision model describes."""
    activation, eps = details(vision, where)
    if entry(vision, "num_channels", int, where) != 3:
        raise UserError(f"{where}: num_channels is {shown(vision['num_channels'])}, it must be 3.")
    patch, side = vision["patch_size"], vision["image_size"]
    return Form(
        size(vision, where),
        patch=patch,
        # Pixels beyond the last whole patch are ignored, such as 6 of 384 with patches of 14.
        image_size=side // patch * patch,
        options=dataclasses.replace(options, activation=activation, norm_eps=eps),
    )


def size(section: dict[str, Any], where: Path) -> Size:
    """Return the size of a vision or text model, given its section of a config.json."""
    width, depth, mlp, heads = (
        bounded(section[name], name, 1, most, where) for name, most in LIMITS.items()
    )
    return Size(width=width, depth=depth, mlp=mlp, heads=heads)


def details(section: dict[str, Any], where: Path) -> tuple[str, float]:
    """Return the activation, under our name, and the epsilon of a vision or text model."""
    act = entry(section, "hidden_act", str, where)
    if act not in ACTIVATIONS:
        raise UserError(
            f"{where}: hidden_act {shown(act)} is unknown.{did_you_mean(act[:80], ACTIVATIONS)}"
        )
    eps = bounded(section["layer_norm_eps"], "layer_norm_eps", 0, 1, where, kind=(int, float))
    return ACTIVATIONS[act], eps


def _class(config: dict[str, Any]) -> str:
    """Return the name of the model's class, for messages, or "" if there is none."""
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else ""
    return name if isinstance(name, str) and name.isidentifier() and len(name) <= 80 else ""


def normalization(folder: Path, family: Family) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the per-channel mean and standard deviation of a folder's preprocessing, in [0, 1]."""
    settings, where = preprocessing(folder)

    def flag(name: str) -> bool:
        return checked(settings.get(name, True), name, bool, where)

    # The normalization is of pixels in 0 to 255 times the factor.
    unit: float = 255
    if flag("do_rescale"):
        factor = settings.get("rescale_factor", 1 / 255)
        unit *= bounded(factor, "rescale_factor", MIN_STD, 1, where, kind=(int, float))
    if not flag("do_normalize"):
        return (0.0,) * 3, (1 / unit,) * 3
    mean = per_channel(settings.get("image_mean", family.mean), "image_mean", -MAX_PIXEL, where)
    std = per_channel(settings.get("image_std", family.std), "image_std", MIN_STD, where)
    return tuple(m / unit for m in mean), tuple(s / unit for s in std)


def preprocessing(folder: Path) -> tuple[dict[str, Any], Path]:
    """Return the settings of a folder's image processor, {} without a file, and their file."""
    where = folder / "preprocessor_config.json"
    if where.is_file():
        return read_json(where), where
    if (where := folder / "processor_config.json").is_file():
        inside = read_json(where).get("image_processor") or {}
        return checked(inside, "image_processor", dict, where), where
    return {}, where


def crops_center(folder: Path) -> bool:
    """Return whether a folder's image processor crops to the central square.

    Without a setting, that is what the processor of its class does: CLIP's crops.
    """
    settings, where = preprocessing(folder)
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    crops = settings.get("do_center_crop")
    if crops is None:
        return str(kind).startswith("CLIP")
    return checked(crops, "do_center_crop", bool, where)


def _side(where: Path, config: dict[str, Any], field: str, most: int) -> int:
    """Return the side of a square, given as a number or as two equal ones."""
    value = config[field]
    sides = value if isinstance(value, list) and value else [value]
    for side in sides:
        bounded(side, field, 1, most, where)
    if len(set(sides)) > 1:
        raise UserError(f"{where}: {field} is {sides[:2]}; only squares can be read.")
    return sides[0]
