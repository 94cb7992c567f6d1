"""DINOv2 of `transformers`, with registers or without (Oquab et al. 2023, arXiv 2304.07193).

Its LayerScale multiplies the output of each branch, which is linear, so it is folded into the
weights of that layer.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from cap_pretrain.convert import vit
from cap_pretrain.convert.encoder import MAX_MLP
from cap_pretrain.convert.family import Family
from cap_pretrain.convert.tables import Computed, Entry, Table
from cap_pretrain.models.vit import Options
from cap_pretrain.untrusted import bounded

MAX_REGISTERS = 2**8
"""Largest number of registers; the published models have 4."""

_LAYER = "encoder.layer.{}."
_POSITIONS = "embeddings.position_embeddings"

MEAN = (0.485, 0.456, 0.406)  # like STD of ImageNet, as in the authors' code (`transforms.py`)
STD = (0.229, 0.224, 0.225)


def scaled(ours: str, layer: str, scale: str) -> dict[str, Entry]:
    """Return the entries of our linear layer, whose output is scaled in the torch model."""
    factors = f"{scale}.lambda1"
    return {
        f"{ours}/kernel": Computed(
            (f"{layer}.weight", factors), lambda weight, by: weight * by[:, None]
        ),
        f"{ours}/bias": Computed((f"{layer}.bias", factors), lambda bias, by: bias * by),
    }


NAMES: dict[str, Entry] = vit.NAMES | {
    "blocks/norm1": _LAYER + "norm1",
    "blocks/norm2": _LAYER + "norm2",
    "blocks/mlp/up": _LAYER + "mlp.fc1",
    **scaled("blocks/attention/out", _LAYER + "attention.output.dense", _LAYER + "layer_scale1"),
    **scaled("blocks/mlp/down", _LAYER + "mlp.fc2", _LAYER + "layer_scale2"),
}


def _half(part: int) -> Callable[[Any], Any]:
    """Return a function that takes the first (0) or second (1) half of a tensor's rows."""
    return lambda tensor: jnp.split(tensor, 2)[part]


GATED: dict[str, Entry] = {  # of the giant model
    **{
        f"blocks/mlp/{ours}/{leaf}": Computed((f"{_LAYER}mlp.weights_in.{theirs}",), _half(part))
        for part, ours in enumerate(("gate", "up"))
        for leaf, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    **scaled("blocks/mlp/down", _LAYER + "mlp.weights_out", _LAYER + "layer_scale2"),
}

REGISTERS: dict[str, Entry] = {
    "class_token": Computed(
        ("embeddings.cls_token", _POSITIONS, "embeddings.register_tokens"),
        lambda token, positions, registers: jnp.concatenate(
            [token[0] + positions[0, :1], registers[0]]
        ),
    )
}


def complete(config: dict[str, Any], where: object) -> dict[str, Any]:
    """Return a vision config with the fields that other families have in place of DINOv2's."""
    ratio = bounded(config.get("mlp_ratio", 4), "mlp_ratio", 0, MAX_MLP, where, (int, float))
    width = bounded(config["hidden_size"], "hidden_size", 1, MAX_MLP, where)
    registers = bounded(
        config.get("num_register_tokens", 0), "num_register_tokens", 0, MAX_REGISTERS, where
    )
    hidden, more = int(width * ratio), {"num_register_tokens": registers}
    if config.get("use_swiglu_ffn"):  # has two thirds of the hidden units
        hidden = -(-int(hidden * 2 / 3) // 8) * 8  # the next multiple of 8
        more["hidden_act"] = "silu"
    return config | more | {"intermediate_size": hidden}


def describe(config: dict[str, Any]) -> tuple[Options, Table]:
    """Return the options of a vision model and the names of its weights."""
    registers = config["num_register_tokens"]
    names = NAMES | vit.NO_BIAS if not config.get("qkv_bias", True) else NAMES
    gated = config.get("use_swiglu_ffn", False)
    names = names | (GATED if gated else {}) | (REGISTERS if registers else {})
    return Options(pool="class", class_token=True, registers=registers, gated=gated), names


def resample(positions: Any, old: tuple[int, int], new: tuple[int, int]) -> Any:
    """Resize position embeddings [H * W, D] as DINOv2 does: bicubic, without antialiasing."""
    rows, columns = (_bicubic(*lengths) for lengths in zip(old, new, strict=True))
    grid = np.asarray(positions, np.float64).reshape(*old, -1)
    resized = np.einsum("ia,jb,abd->ijd", rows, columns, grid)
    return resized.reshape(-1, grid.shape[-1]).astype(np.float32)


def _bicubic(old: int, new: int) -> np.ndarray:
    """Return the weights [new, old] of cubic convolution, with PyTorch's constant, -0.75.

    Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing", equation 15.
    """
    a, weights = -0.75, np.zeros((new, old))
    places = (np.arange(new) + 0.5) * old / new - 0.5
    for near in range(-1, 3):
        index = np.floor(places).astype(int) + near
        x = np.abs(places - index)
        inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
        outer = a * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(
            weights, (np.arange(new), np.clip(index, 0, old - 1)), np.where(x <= 1, inner, outer)
        )
    return weights


FAMILY = Family(
    name="DINOv2",
    prefix="dinov2.",
    describe=describe,
    complete=complete,
    ignored=("classifier.", "embeddings.mask_token"),
    defaults={"patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-6},
    mean=MEAN,
    std=STD,
    resample=resample,
)

WITH_REGISTERS = dataclasses.replace(
    FAMILY,
    prefix="dinov2_with_registers.",
    defaults={**FAMILY.defaults, "num_register_tokens": 4},
)
