"""AIMv2's vision models of `transformers` (Fini et al. 2024, arXiv 2411.14402).

They have RMSNorm, MLPs with a gate and no biases. Models with a head pool by the attention of a
learned query, without the query's projection and the MLP of our attention pooling: the one is set
to the identity, the other to zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cap_pretrain.convert import clip
from cap_pretrain.convert.encoder import MAX_WIDTH
from cap_pretrain.convert.family import Family
from cap_pretrain.convert.tables import Computed, Entry, Table
from cap_pretrain.models.vit import Options, resample_positions
from cap_pretrain.untrusted import bounded

_LAYER = "encoder.layers.{}."
TEMPERATURE = 10_000.0
"""Of the sine-cosine positions of native models, as in their `modeling_aimv2.py`."""

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
    "head/norm/scale": None,
    **dict.fromkeys(("head/mlp/up/kernel", "head/mlp/gate/kernel", "head/mlp/down/kernel")),
    **dict.fromkeys(("head/mlp/up/bias", "head/mlp/gate/bias", "head/mlp/down/bias")),
}


def complete(config: dict[str, Any], where: object) -> dict[str, Any]:
    """Return a vision config with the field that other families have in place of AIMv2's."""
    bounded(config["hidden_size"], "hidden_size", 1, MAX_WIDTH, where)
    return config | {"layer_norm_eps": config["rms_norm_eps"]}


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
    if config.get("is_native", False):
        grid, width = config["image_size"] // config["patch_size"], config["hidden_size"]
        names |= {"positions": Computed((), lambda: sines((grid, grid), width))}
    options = Options(
        pool="map" if config.get("use_head", True) else "gap",
        patch_norm=True,
        norm="rms",
        gated=True,
        bias=attention or mlp,
    )
    return options, names


def sines(grid: tuple[int, int], width: int) -> jax.Array:
    """Return the positions of native models, float32 [H * W, width]: sines and cosines.

    They are those of the column, then those of the row, as in the models' code.
    """
    rate = TEMPERATURE ** -(jnp.arange(width // 4) / (width // 4))
    row, column = jnp.meshgrid(*(jnp.arange(side) for side in grid), indexing="ij")
    angles = [place.reshape(-1, 1) * rate for place in (column, row)]
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=1)


def resample(positions: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Resize position embeddings [H * W, D]; compute those of native models for the new grid."""
    width = positions.shape[-1]
    if width % 4 == 0 and np.allclose(positions, sines(old, width), atol=1e-3):
        return sines(new, width)
    return resample_positions(positions, old, new)


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
    resample=resample,
)
