"""SigLIP of `transformers`, whose vision model is our ViT (Zhai et al. 2023, arXiv 2303.15343)."""

from typing import Any

from cap_pretrain.convert.family import BLOCKS, Family
from cap_pretrain.convert.tables import Entry, Fused, Table
from cap_pretrain.models.vit import Options

NAMES: dict[str, Entry] = BLOCKS | {
    "patch_embedding": "embeddings.patch_embedding",
    "positions": "embeddings.position_embedding.weight",
    "norm": "post_layernorm",
    "head/probe": "head.probe",
    "head/attention/query": Fused("head.attention.in_proj", 0),
    "head/attention/key": Fused("head.attention.in_proj", 1),
    "head/attention/value": Fused("head.attention.in_proj", 2),
    "head/attention/out": "head.attention.out_proj",
    "head/norm": "head.layernorm",
    "head/mlp/up": "head.mlp.fc1",
    "head/mlp/down": "head.mlp.fc2",
}

TEXT_NAMES: dict[str, Entry] = BLOCKS | {  # of the text tower and the projection after it
    "embedding/embedding": "embeddings.token_embedding.weight",
    "positions": "embeddings.position_embedding.weight",
    "norm": "final_layer_norm",
    "text_projection": "head",
}

TEXT = {"bias": True, "text_causal": False, "text_pool": "last"}
LEARNER = {"contrast": "sigmoid", "head": "none", **TEXT}
"""Options of our dual encoder that are SigLIP's."""


def describe(config: dict[str, Any]) -> tuple[Options, Table]:
    """Return options (with `gap` there is no head, and users average tokens) and names."""
    return Options(pool="map" if config.get("vision_use_head", True) else "gap"), NAMES


FAMILY = Family(
    name="SigLIP",
    prefix="vision_model.",
    describe=describe,
    ignored=("text_model.", "logit_scale", "logit_bias", "classifier.", "embeddings.position_ids"),
    defaults={"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)
