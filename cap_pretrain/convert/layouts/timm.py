"""Export of ViTs as folders that timm loads: config.json and model.safetensors.

timm's VisionTransformer has every option of ours: with and without class token, pooled by the mean,
by attention or by the class token, and with the last norm before or after pooling.
"""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain.convert.encoder import OURS, Form
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
from cap_pretrain.convert.tables import Entry, Fused, to_torch
from cap_pretrain.errors import UserError

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
