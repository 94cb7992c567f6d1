"""The ViT of `transformers`, without classifier (Dosovitskiy et al. 2020, arXiv 2010.11929)."""

from typing import Any

from cap_pretrain.convert.family import Family
from cap_pretrain.convert.tables import Computed, Entry, Table
from cap_pretrain.models.vit import Options

_POSITIONS = "embeddings.position_embeddings"
_LAYER = "encoder.layer.{}."

NAMES: dict[str, Entry] = {
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "positions": Computed((_POSITIONS,), lambda positions: positions[0, 1:]),
    "class_token": Computed(
        ("embeddings.cls_token", _POSITIONS), lambda token, positions: token[0] + positions[0, :1]
    ),
    "blocks/norm1": _LAYER + "layernorm_before",
    "blocks/attention/query": _LAYER + "attention.attention.query",
    "blocks/attention/key": _LAYER + "attention.attention.key",
    "blocks/attention/value": _LAYER + "attention.attention.value",
    "blocks/attention/out": _LAYER + "attention.output.dense",
    "blocks/norm2": _LAYER + "layernorm_after",
    "blocks/mlp/up": _LAYER + "intermediate.dense",
    "blocks/mlp/down": _LAYER + "output.dense",
    "norm": "layernorm",
}

NO_BIAS: dict[str, Entry] = {
    f"blocks/attention/{part}/bias": None for part in ("query", "key", "value")
}
"""What models without `qkv_bias` lack."""


def describe(config: dict[str, Any]) -> tuple[Options, Table]:
    """Return the options of such a ViT and the names of its weights."""
    names = NAMES if config.get("qkv_bias", True) else NAMES | NO_BIAS
    return Options(pool="class", class_token=True), names


FAMILY = Family(
    name="ViT",
    prefix="vit.",
    describe=describe,
    ignored=("pooler.", "classifier."),
    defaults={"patch_size": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-12},
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)
