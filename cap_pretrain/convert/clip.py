"""CLIP as `transformers` has it: CLIPModel and CLIPVisionModel (Radford et al. 2021, 2103.00020).

The pooled vector is what CLIP projects to compare it with texts; the projection is left behind.
"""

from cap_pretrain.convert.family import Family
from cap_pretrain.models.vit import Options

_POSITIONS = "embeddings.position_embedding.weight"
_LAYER = "encoder.layers.{}."

OPTIONS = Options(pool="class", class_token=True, pre_norm=True, final_norm="pooled")

# The constants of OpenAI's code, `_transform` in clip.py.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

NAMES = {
    "patch_embedding": "embeddings.patch_embedding",
    "patch_embedding/bias": None,
    "positions": lambda take: take(_POSITIONS)[1:],
    "class_token": lambda take: take("embeddings.class_embedding") + take(_POSITIONS)[:1],
    "pre_norm": "pre_layrnorm",
    "blocks/norm1": _LAYER + "layer_norm1",
    "blocks/attention/query": _LAYER + "self_attn.q_proj",
    "blocks/attention/key": _LAYER + "self_attn.k_proj",
    "blocks/attention/value": _LAYER + "self_attn.v_proj",
    "blocks/attention/out": _LAYER + "self_attn.out_proj",
    "blocks/norm2": _LAYER + "layer_norm2",
    "blocks/mlp/up": _LAYER + "mlp.fc1",
    "blocks/mlp/down": _LAYER + "mlp.fc2",
    "norm": "post_layernorm",
}

FAMILY = Family(
    name="CLIP",
    prefix="vision_model.",
    describe=lambda config: (OPTIONS, NAMES),
    ignored=(
        *("text_model.", "text_projection.", "visual_projection.", "logit_scale", "classifier."),
        "embeddings.position_ids",
    ),
    defaults={"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    mean=MEAN,
    std=STD,
)
