"""SigLIP as `transformers` has it: SiglipModel and SiglipVisionModel.

Zhai et al. 2023 (2303.15343). Its vision model is ours with either pooling: `pool=map` with its
attention pooling head, `pool=gap` without, where whoever uses it averages the tokens. So ours leave
as SigLIP, too.
"""

from typing import Any

from cap_pretrain.convert.family import Family
from cap_pretrain.convert.tables import Fused, Table
from cap_pretrain.models.vit import Options

_LAYER = "encoder.layers.{}."

# Of the vision model and of the text model.
BLOCKS = {
    "blocks/norm1": _LAYER + "layer_norm1",
    "blocks/attention/query": _LAYER + "self_attn.q_proj",
    "blocks/attention/key": _LAYER + "self_attn.k_proj",
    "blocks/attention/value": _LAYER + "self_attn.v_proj",
    "blocks/attention/out": _LAYER + "self_attn.out_proj",
    "blocks/norm2": _LAYER + "layer_norm2",
    "blocks/mlp/up": _LAYER + "mlp.fc1",
    "blocks/mlp/down": _LAYER + "mlp.fc2",
}

NAMES = BLOCKS | {
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

# Of our text tower; "projection" is the linear layer behind it.
TEXT_NAMES = BLOCKS | {
    "embedding/embedding": "embeddings.token_embedding.weight",
    "positions": "embeddings.position_embedding.weight",
    "norm": "final_layer_norm",
    "projection": "head",
}


def describe(config: dict[str, Any]) -> tuple[Options, Table]:
    """The options of such a ViT and the names of its weights."""
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
