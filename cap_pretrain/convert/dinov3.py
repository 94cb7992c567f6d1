"""DINOv3's ViTs of `transformers` (Siméoni et al. 2025, arXiv 2508.10104).

They differ from DINOv2 in rotary positions, which fit images of any size. In training the authors
also rescale the positions at random; here they stay as they are.
"""

from typing import Any

import jax.numpy as jnp

from cap_pretrain.convert.dinov2 import MAX_REGISTERS, MEAN, STD, scaled
from cap_pretrain.convert.family import Family
from cap_pretrain.convert.tables import Computed, Entry, Table
from cap_pretrain.models.positions import MAX_BASE
from cap_pretrain.models.vit import Options
from cap_pretrain.untrusted import bounded

_LAYER = "layer.{}."
_BIASES = {  # field of the config, its default -> our layers
    ("query_bias", True): ("attention/query",),
    ("key_bias", False): ("attention/key",),
    ("value_bias", True): ("attention/value",),
    ("proj_bias", True): ("attention/out",),
    ("mlp_bias", True): ("mlp/up", "mlp/gate", "mlp/down"),
}

NAMES: dict[str, Entry] = {
    "patch_embedding": "embeddings.patch_embeddings",
    "class_token": Computed(  # and the registers, of which there may be none
        ("embeddings.cls_token", "embeddings.register_tokens"),
        lambda token, registers: jnp.concatenate([token[0], registers[0]]),
    ),
    "blocks/norm1": _LAYER + "norm1",
    "blocks/attention/query": _LAYER + "attention.q_proj",
    "blocks/attention/key": _LAYER + "attention.k_proj",
    "blocks/attention/value": _LAYER + "attention.v_proj",
    "blocks/norm2": _LAYER + "norm2",
    "blocks/mlp/up": _LAYER + "mlp.up_proj",
    "blocks/mlp/gate": _LAYER + "mlp.gate_proj",
    **scaled("blocks/attention/out", _LAYER + "attention.o_proj", _LAYER + "layer_scale1"),
    **scaled("blocks/mlp/down", _LAYER + "mlp.down_proj", _LAYER + "layer_scale2"),
    "norm": "norm",
}


def complete(config: dict[str, Any], where: object) -> dict[str, Any]:
    """Return a vision config whose further fields have been checked."""
    bounded(config["num_register_tokens"], "num_register_tokens", 0, MAX_REGISTERS, where)
    bounded(config["rope_theta"], "rope_theta", 1, MAX_BASE, where, kind=(int, float))
    return config


def describe(config: dict[str, Any]) -> tuple[Options, Table]:
    """Return the options of a vision model and the names of its weights."""
    names = dict(NAMES)
    for (field, usual), layers in _BIASES.items():
        if not config.get(field, usual):
            names |= {f"blocks/{layer}/bias": None for layer in layers}
    options = Options(
        pool="class",
        class_token=True,
        registers=config["num_register_tokens"],
        positions="rotary",
        rope_base=float(config["rope_theta"]),
        gated=config.get("use_gated_mlp", False),
    )
    return options, names


FAMILY = Family(
    name="DINOv3",
    prefix="model.",
    describe=describe,
    complete=complete,
    ignored=("classifier.", "embeddings.mask_token"),
    defaults={
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "num_register_tokens": 0,
    },
    mean=MEAN,
    std=STD,
)
