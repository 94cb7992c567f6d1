"""CLIP's vision model of `transformers`, unprojected (Radford et al. 2021, arXiv 2103.00020)."""

import dataclasses
from typing import Any

from cap_pretrain.convert.family import BLOCKS, Family
from cap_pretrain.convert.tables import Computed, Entry, Table
from cap_pretrain.models.vit import Options

_POSITIONS = "embeddings.position_embedding.weight"

OPTIONS = Options(pool="class", class_token=True, pre_norm=True, final_norm="pooled")

MEAN = (0.48145466, 0.4578275, 0.40821073)  # like STD from OpenAI's clip.py, `_transform`
STD = (0.26862954, 0.26130258, 0.27577711)

NAMES: dict[str, Entry] = BLOCKS | {
    "patch_embedding": "embeddings.patch_embedding",
    "patch_embedding/bias": None,
    "positions": Computed((_POSITIONS,), lambda positions: positions[1:]),
    "class_token": Computed(
        ("embeddings.class_embedding", _POSITIONS), lambda token, positions: token + positions[:1]
    ),
    "pre_norm": "pre_layrnorm",
    "norm": "post_layernorm",
}

TEXT_NAMES: dict[str, Entry] = BLOCKS | {  # of the text tower and the projections
    "embedding/embedding": "embeddings.token_embedding.weight",
    "positions": "embeddings.position_embedding.weight",
    "norm": "final_layer_norm",
    "text_projection": "text_projection",
    "image_projection": "visual_projection",
}

LEARNER = {  # options of our dual encoder that are CLIP's
    "contrast": "softmax",
    "head": "linear",
    "bias": False,
    "text_causal": True,
    "text_pool": "eos",
}


def is_vision(options: Options) -> bool:
    """Return whether options are those of CLIP's vision model, with any activation and epsilon."""
    own = (options.activation, options.norm_eps)
    return dataclasses.replace(OPTIONS, activation=own[0], norm_eps=own[1]) == options


def describe(config: dict[str, Any]) -> tuple[Options, Table]:
    """Return the options of a vision model and the names of its weights."""
    del config  # all CLIPs are alike
    return OPTIONS, NAMES


FAMILY = Family(
    name="CLIP",
    prefix="vision_model.",
    describe=describe,
    ignored=(
        *("text_model.", "text_projection.", "visual_projection.", "logit_scale", "classifier."),
        "embeddings.position_ids",
    ),
    defaults={"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    mean=MEAN,
    std=STD,
)
