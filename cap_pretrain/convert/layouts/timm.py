"""Export of ViTs as folders that timm loads, config.json and model.safetensors, and their import.

timm's VisionTransformer has every option of ours: with and without class token, pooled by the mean,
by attention or by the class token, and with the last norm before or after pooling.
"""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain.convert import openai
from cap_pretrain.convert.encoder import (
    MAX_DEPTH,
    MAX_GRID,
    MAX_HEADS,
    MAX_MLP,
    MAX_PATCH,
    MAX_PIXEL,
    MAX_WIDTH,
    MIN_STD,
    OURS,
    Form,
    Pretrained,
    assemble,
    per_channel,
)
from cap_pretrain.convert.layouts.base import (
    BILINEAR,
    Params,
    Source,
    Written,
    check_encoder,
    mlp_ratio,
    vit_form,
    write_json,
    write_tensors,
)
from cap_pretrain.convert.tables import Computed, Entry, Fused, to_torch
from cap_pretrain.convert.weights import open_folder as open_weights
from cap_pretrain.convert.weights import read_json
from cap_pretrain.errors import UserError
from cap_pretrain.models.mlp import ACTIVATIONS
from cap_pretrain.models.sizes import Size
from cap_pretrain.models.vit import Options
from cap_pretrain.untrusted import bounded, entry, shown

ARCHITECTURES = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
"""Models of timm by the epsilon of their norms, which no argument sets; all else is overridden."""

_POOLS = {"gap": "avg", "map": "map", "class": "token"}
_LAYER = "blocks.{}."

NAMES: dict[str, Entry] = {
    "patch_embedding": "patch_embed.proj",
    "positions": "pos_embed",
    "class_token": "cls_token",
    "pre_norm": "norm_pre",
    "blocks/norm1": _LAYER + "norm1",
    "blocks/attention/query": Fused(_LAYER + "attn.qkv", 0, "."),
    "blocks/attention/key": Fused(_LAYER + "attn.qkv", 1, "."),
    "blocks/attention/value": Fused(_LAYER + "attn.qkv", 2, "."),
    "blocks/attention/out": _LAYER + "attn.proj",
    "blocks/norm2": _LAYER + "norm2",
    "blocks/mlp/up": _LAYER + "mlp.fc1",
    "blocks/mlp/down": _LAYER + "mlp.fc2",
    "norm": "norm",
    "head/probe": "attn_pool.latent",
    "head/attention/query": "attn_pool.q",
    "head/attention/key": "attn_pool.k",
    "head/attention/value": "attn_pool.v",
    "head/attention/out": "attn_pool.proj",
    "head/norm": "attn_pool.norm",
    "head/mlp/up": "attn_pool.mlp.fc1",
    "head/mlp/down": "attn_pool.mlp.fc2",
}

_FOLDED: dict[str, Entry] = {"patch_embedding/bias": None}  # in the positions, with `pre_norm`


def _half(leaf: str, part: int) -> Computed:
    """Return the entry of keys (0) or values (1) of attention pooling, which are stacked."""
    return Computed(
        (f"attn_pool.kv.{leaf}",), lambda both: both.reshape(2, -1, *both.shape[1:])[part]
    )


READ: dict[str, Entry] = NAMES | {
    "positions": Computed(("pos_embed",), lambda positions: positions[0]),
    "class_token": Computed(("cls_token",), lambda token: token[0]),
    **{
        f"head/attention/{name}/{ours}": _half(theirs, part)
        for part, name in enumerate(("key", "value"))
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
}
"""Where our parameters are in timm's tensors."""


def write(folder: Path, source: Source) -> Written:
    """Write the encoder of a run; see `layouts.write`."""
    form = vit_form(source.config, "timm")
    encoder = source.inside("encoder")
    check_encoder(source.config, encoder, form)
    write_json(folder / "config.json", model_config(source.config, form))
    write_tensors(folder / "model.safetensors", tensors(encoder, form))
    learner = source.config.learner.name
    return Written(
        library="timm",
        usage=(
            "```python\nimport timm\n\n"
            f'model = timm.create_model("{source.shown_place}", pretrained=True).eval()\n'
            "preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
            "\nvector = model(preprocess(image)[None])\n```",
            "`model(…)` is the pooled vector that the run's own evaluations used; "
            "`model.forward_features(…)` are the tokens. timm interpolates where the run averaged "
            "areas, so pixels differ slightly.",
        ),
        left_out=f"the parts of the learner {learner} other than the encoder, since timm holds "
        "image encoders; they stay in the checkpoint",
    )


def model_config(config: ConfigDict, form: Form) -> dict[str, Any]:
    """Return the config.json of a model; raises UserError if timm cannot express it."""
    options, (mean, std) = form.options, OURS
    if options.norm_eps not in ARCHITECTURES:
        known = " or ".join(f"{eps:g}" for eps in ARCHITECTURES)
        raise UserError(
            f"model.norm_eps: is {options.norm_eps:g}, and ViTs of timm have {known}; it cannot be "
            "exported in this layout."
        )
    if options.registers:
        raise UserError(
            "model.registers: an encoder with registers cannot be exported in this layout; pass "
            "its workdir as --config.encoder instead."
        )
    pooled_norm = options.final_norm == "pooled"
    pool = _POOLS[options.pool]
    side = form.image_size
    return {
        "architecture": ARCHITECTURES[options.norm_eps],
        "num_classes": 0,
        "num_features": form.size.width,
        "global_pool": pool,
        "model_args": {
            "num_classes": 0,
            "img_size": side,
            "patch_size": form.patch,
            "embed_dim": form.size.width,
            "depth": form.size.depth,
            "num_heads": form.size.heads,
            "mlp_ratio": mlp_ratio(form.size.width, form.size.mlp),
            "act_layer": options.activation,  # timm's names are the same
            "class_token": options.class_token,
            "no_embed_class": True,
            "global_pool": pool,
            "pre_norm": options.pre_norm,
            "fc_norm": pooled_norm,
        },
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": BILINEAR,
            "crop_pct": 1.0,
            "crop_mode": "squash" if config.data.crop == "none" else "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def tensors(encoder: Params, form: Form) -> dict[str, np.ndarray]:
    """Return the tensors of timm's model by name."""
    names = NAMES | {"norm": "fc_norm"} if form.options.final_norm == "pooled" else NAMES
    found = to_torch(encoder, names)
    if form.options.pre_norm:  # such models have no bias there; positions are added right after it
        found["pos_embed"] = found["pos_embed"] + found.pop("patch_embed.proj.bias")
    if form.options.pool == "map":
        for leaf in ("weight", "bias"):
            parts = [found.pop(f"attn_pool.{part}.{leaf}") for part in "kv"]
            found[f"attn_pool.kv.{leaf}"] = np.concatenate(parts)
    stacked = {name: found[name][None] for name in ("pos_embed", "cls_token") if name in found}
    return found | stacked


def open_folder(folder: Path) -> Pretrained:
    """Read the encoder of an export for timm or OpenCLIP; see `convert.open_encoder`.

    Raises UserError if it is none, or another of timm's models.
    """
    where = folder / "config.json"
    config = read_json(where)
    form = _form(config, where)
    preprocessing = entry(config, "pretrained_cfg", dict, where)
    names = READ | _FOLDED if form.options.pre_norm else READ
    names |= {"norm": "fc_norm"} if form.options.final_norm == "pooled" else {}
    weights = open_weights(folder, "model.safetensors", openai.WEIGHTS[0])
    return assemble(
        form,
        weights.without("visual.trunk."),
        names,
        ignored=("visual.head.", "text.", "logit_"),
        mean=per_channel(entry(preprocessing, "mean", list, where), "mean", -MAX_PIXEL, where),
        std=per_channel(entry(preprocessing, "std", list, where), "std", MIN_STD, where),
        source="ViT of timm",
    )


def _form(config: dict[str, Any], where: Path) -> Form:
    """Return the architecture in a config.json that `model_config` wrote."""
    args = entry(config, "model_args", dict, where)
    architecture = entry(config, "architecture", str, where)
    epsilons = {name: eps for eps, name in ARCHITECTURES.items()}
    pools = {theirs: ours for ours, theirs in _POOLS.items()}
    pool, activation = (entry(args, name, str, where) for name in ("global_pool", "act_layer"))
    for value, known in ((architecture, epsilons), (pool, pools), (activation, ACTIVATIONS)):
        if value not in known:
            raise UserError(
                f"{where}: {shown(value)} is not supported; only exports of cap_pretrain for timm "
                "and OpenCLIP can be read."
            )

    def number(name: str, most: int) -> int:
        return bounded(entry(args, name, int, where), name, 1, most, where)

    width, patch = number("embed_dim", MAX_WIDTH), number("patch_size", MAX_PATCH)
    ratio = entry(args, "mlp_ratio", (int, float), where)
    mlp = int(width * bounded(ratio, "mlp_ratio", 0, MAX_MLP, where, kind=(int, float)))
    flags = {n: entry(args, n, bool, where) for n in ("class_token", "pre_norm", "fc_norm")}
    return Form(
        Size(width, number("depth", MAX_DEPTH), mlp, number("num_heads", MAX_HEADS)),
        patch=patch,
        image_size=number("img_size", MAX_PATCH * MAX_GRID) // patch * patch,
        options=Options(
            activation=activation,
            norm_eps=epsilons[architecture],
            pool=pools[pool],
            class_token=flags["class_token"],
            pre_norm=flags["pre_norm"],
            final_norm="pooled" if flags["fc_norm"] else "tokens",
        ),
    )
