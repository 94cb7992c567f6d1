"""Import of checkpoints in the layout of OpenAI's CLIP, which OpenCLIP writes, too."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cap_pretrain.convert import clip, towers
from cap_pretrain.convert.encoder import (
    MAX_HEADS,
    MAX_PIXEL,
    MAX_WIDTH,
    MIN_STD,
    Form,
    Pretrained,
    assemble,
    per_channel,
)
from cap_pretrain.convert.tables import Computed, Entry, Fused
from cap_pretrain.convert.towers import Text, Tower, Whole
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


def _blocks(layer: str) -> dict[str, Entry]:
    """Return the names of the parameters of the blocks, whose own names begin with `layer`."""
    return {
        "blocks/norm1": layer + "ln_1",
        "blocks/attention/query": Fused(layer + "attn.in_proj", 0),
        "blocks/attention/key": Fused(layer + "attn.in_proj", 1),
        "blocks/attention/value": Fused(layer + "attn.in_proj", 2),
        "blocks/attention/out": layer + "attn.out_proj",
        "blocks/norm2": layer + "ln_2",
        "blocks/mlp/up": layer + "mlp.c_fc",
        "blocks/mlp/down": layer + "mlp.c_proj",
    }


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
    **_blocks(_LAYER),
    "norm": "visual.ln_post",
}

_TEXT_LAYER = "transformer.resblocks.{}."

TEXT_NAMES: dict[str, Entry] = {  # of the text tower and the projections
    "embedding/embedding": "token_embedding.weight",
    "positions": "positional_embedding",
    **_blocks(_TEXT_LAYER),
    "norm": "ln_final",
    "text_projection": "text_projection",
    "text_projection/kernel": Computed(("text_projection",), lambda kernel: kernel.T),
    "image_projection/kernel": Computed(("visual.proj",), lambda kernel: kernel.T),
}

IGNORED = (  # projection, text tower, and what OpenAI's archives hold besides weights
    *("visual.proj", "transformer.", "token_embedding.", "positional_embedding", "ln_final."),
    *("text_projection", "text.", "attn_mask", "logit_scale", "logit_bias"),
    *("input_resolution", "context_length", "vocab_size"),
)

# Fields of OpenCLIP's text_cfg that can have any value, since the shapes of the weights imply them
# or they concern the tokenizer or OpenCLIP's own program.
_ANY = ("vocab_size", "width", "layers", "mlp_ratio", "hf_tokenizer_name", "tokenizer_kwargs")

# Fields of OpenCLIP's vision_cfg that the shapes of the weights imply, and the one they do not.
_IN_SHAPES = ("image_size", "layers", "width", "patch_size", "mlp_ratio")
_HEAD_WIDTH = "head_width"


def read(weights: Weights) -> Pretrained:
    """Read weights without a config, with OpenAI's activation; see `convert.open_encoder`."""
    found = _read(weights, "quick_gelu", HEAD_WIDTH, clip.MEAN, clip.STD, "OpenAI's CLIP")
    text = any(name.endswith("token_embedding.weight") for name in weights.names)
    return dataclasses.replace(found, text=text)


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


def read_whole(folder: Path, encoder_width: int) -> tuple[Whole | None, str]:
    """Read what a folder of OpenCLIP holds besides its image encoder; see `dual.read`."""
    where = folder / CONFIG
    model = checked(read_json(where).get("model_cfg") or {}, "model_cfg", dict, where)
    section = checked(model.get("text_cfg") or {}, "text_cfg", dict, where)
    vision = checked(model.get("vision_cfg") or {}, "vision_cfg", dict, where)
    length = bounded(
        section.get("context_length", 77), "context_length", 3, towers.MAX_LENGTH, where
    )
    text = _text(folder, section, length)
    if isinstance(text, str):
        return None, f"{folder}: its text tower is left out, as {text}"
    weights = open_weights_of(folder, *WEIGHTS).without("text.")
    options, names = _text_options(model, section, where), dict(TEXT_NAMES)
    if options["bias"]:
        del names["text_projection/kernel"]  # it is a linear layer like any other
        names["image_projection/bias"] = None
    if "timm_model_name" in vision:  # of an export of ours
        del names["image_projection/kernel"]
        names.pop("image_projection/bias", None)
        names["image_projection"] = "visual.head.proj"
    layers = {m[1] for name in weights.names if (m := re.match(_TEXT_NUMBER, name))}
    positions, width = weights.shape("positional_embedding", 2)
    if positions != length:
        raise UserError(f"{where}: context_length is {length}, but the weights have {positions}.")
    tower = Tower(
        options=options,
        size=Size(
            width=width,
            depth=len(layers),
            mlp=weights.shape(_TEXT_LAYER.format(0) + "mlp.c_fc.bias", 1)[0],
            heads=bounded(section.get("heads", 8), "heads", 1, MAX_HEADS, where),
        ),
        names=names,
        ignored=("visual.", "logit_scale", "logit_bias", "attn_mask"),
        widths=(encoder_width, bounded(model.get("embed_dim"), "embed_dim", 1, MAX_WIDTH, where)),
    )
    return towers.read(folder, weights, tower, text), ""


_TEXT_NUMBER = _TEXT_LAYER.replace(".", r"\.").format(r"(\d+)")


def _text(folder: Path, section: dict[str, Any], length: int) -> Text | str:
    """Return how texts are encoded, or why that is not known here."""
    if section.get("hf_tokenizer_name"):
        return towers.pieces(folder, length) or f"it has no {towers.needed()}"
    file = towers.named(folder, towers.BYTE_PAIRS)
    if not file:
        return f"it has no {towers.BYTE_PAIRS[0]}, nor {towers.BYTE_PAIRS[1]} with vocab.json"
    return Text(file, length, pads_with_eos=False)


def _text_options(model: dict[str, Any], section: dict[str, Any], where: Path) -> dict[str, Any]:
    """Return the options of the learner that a model_cfg describes, if it is without timm."""

    def flag(inside: dict[str, Any], name: str) -> bool:
        return checked(inside.get(name) or False, name, bool, where)

    act, norm = (
        checked(section.get(name) or {}, name, dict, where)
        for name in ("act_kwargs", "norm_kwargs")
    )
    pool = section.get("pool_type", "argmax")
    other = [k for k, v in section.items() if v and k not in (*_ANY, *_READ)]
    other += [f"act_kwargs {k}" for k, v in act.items() if (k, v) != ("approximate", "tanh")]
    other += [f"norm_kwargs {k}" for k in norm if k != "eps"]
    if other or pool not in _POOLS:
        raise UserError(
            f"{where}: its text tower has {few(other or [f'pool_type {pool}'])}; only the plain "
            "transformer of CLIP and SigLIP can be read."
        )
    plain = "quick_gelu" if flag(model, "quick_gelu") else "gelu"
    sigmoid = model.get("init_logit_bias") is not None
    return {
        "contrast": "sigmoid" if sigmoid else "softmax",
        "bias": flag(section, "proj_bias"),
        "text_activation": "gelu_tanh" if act else plain,
        "text_norm_eps": bounded(norm.get("eps", NORM_EPS), "eps", 0, 1, where, kind=(int, float)),
        "text_causal": not flag(section, "no_causal_mask"),
        "text_pool": _POOLS[pool],
    }


_POOLS = {"argmax": "eos", "last": "last"}
_READ = (
    *("context_length", "heads", "proj_bias", "act_kwargs", "norm_kwargs", "no_causal_mask"),
    "pool_type",
)
