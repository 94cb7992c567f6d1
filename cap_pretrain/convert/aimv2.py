"""AIMv2's vision models of `transformers` (Fini et al. 2024, arXiv 2411.14402).

They have RMSNorm, MLPs with a gate and no biases. Models with a head pool by the attention of a
learned query, without the query's projection and the MLP of our attention pooling. So that the
pooling computes the same, and all of it can be trained, that projection is the identity, and the
last layer of the MLP zero.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from cap_pretrain.convert import clip
from cap_pretrain.convert.encoder import MAX_MLP, MAX_WIDTH
from cap_pretrain.convert.family import Family
from cap_pretrain.convert.tables import Computed, Entry, Table
from cap_pretrain.models.mlp import XAVIER
from cap_pretrain.models.vit import Options
from cap_pretrain.untrusted import bounded

_LAYER = "encoder.layers.{}."

NAMES: dict[str, Entry] = {
    "patch_embedding": "embeddings.patch_embed",
    "patch_norm": "embeddings.rms_norm",
    "positions": "embeddings.position_embedding.weight",
    "blocks/norm1": _LAYER + "rms_norm1",
    "blocks/attention/query": _LAYER + "attention.q_proj",
    "blocks/attention/key": _LAYER + "attention.k_proj",
    "blocks/attention/value": _LAYER + "attention.v_proj",
    "blocks/attention/out": _LAYER + "attention.out_proj",
    "blocks/norm2": _LAYER + "rms_norm2",
    "blocks/mlp/up": _LAYER + "ffn.up_proj",
    "blocks/mlp/gate": _LAYER + "ffn.gate_proj",
    "blocks/mlp/down": _LAYER + "ffn.down_proj",
    "norm": "rms_norm",
}

HEAD: dict[str, Entry] = {
    "head/probe": "head.cls_token",
    "head/attention/query/kernel": Computed(
        ("head.cls_token",), lambda token: jnp.eye(token.shape[-1], dtype=jnp.float32)
    ),
    "head/attention/query/bias": None,
    "head/attention/key": "head.k_proj",
    "head/attention/value": "head.v_proj",
    "head/attention/out": "head.output_proj",
    **dict.fromkeys(("head/mlp/up/bias", "head/mlp/gate/bias", "head/mlp/down/bias")),
    "head/mlp/down/kernel": None,
}


def complete(config: dict[str, Any], where: object) -> dict[str, Any]:
    """Return a vision config with the field that other families have in place of AIMv2's."""
    for name, most in (("hidden_size", MAX_WIDTH), ("intermediate_size", MAX_MLP)):
        bounded(config[name], name, 1, most, where)
    eps = bounded(config["rms_norm_eps"], "rms_norm_eps", 0, 1, where, kind=(int, float))
    return config | {"layer_norm_eps": eps}


def describe(config: dict[str, Any]) -> tuple[Options, Table]:
    """Return the options of a vision model and the names of its weights."""
    attention, mlp = config.get("qkv_bias", False), config.get("mlp_bias", False)
    names = NAMES | HEAD
    if not attention:
        parts = ("query", "key", "value", "out")
        names |= {f"blocks/attention/{part}/bias": None for part in parts}
        names |= {f"head/attention/{part}/bias": None for part in ("key", "value")}
    if not mlp:
        names |= {f"blocks/mlp/{part}/bias": None for part in ("up", "gate", "down")}
    width, hidden = config["hidden_size"], config["intermediate_size"]
    names |= {
        "head/norm/scale": Computed((), lambda: jnp.ones(width)),
        **{
            f"head/mlp/{part}/kernel": Computed((), functools.partial(_drawn, n, (hidden, width)))
            for n, part in enumerate(("up", "gate"))
        },
    }
    options = Options(
        pool="map" if config.get("use_head", True) else "gap",
        positions="sines" if config.get("is_native", False) else "learned",
        patch_norm=True,
        norm="rms",
        gated=True,
        bias=attention or mlp,
    )
    return options, names


def _drawn(seed: int, shape: tuple[int, int]) -> jax.Array:
    """Return initial weights in torch's layout."""
    return XAVIER(jax.random.key(seed), shape)


FAMILY = Family(
    name="AIMv2",
    prefix="vision_model.",
    describe=describe,
    complete=complete,
    ignored=("text_model.", "text_projection.", "visual_projection.", "logit_scale", "classifier."),
    defaults={
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "patch_size": 14,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
    },
    mean=clip.MEAN,
    std=clip.STD,
)
