"""SigLIP 2 of `transformers` in native aspect ratios (Tschannen et al. 2025, arXiv 2502.14786).

Its other models are SigLIP's. These read patches, so their patch embedding is a linear layer, and
their configs give the number of position embeddings in place of the size of images.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from cap_pretrain.convert import siglip
from cap_pretrain.convert.encoder import MAX_GRID, MAX_PATCH
from cap_pretrain.errors import UserError
from cap_pretrain.naflex import NAFLEX
from cap_pretrain.untrusted import bounded

PATCH_EMBEDDING = "embeddings.patch_embedding.weight"


def complete(config: dict[str, Any], where: object) -> dict[str, Any]:
    """Return a vision config with the size of the square images whose patches have positions."""
    count = bounded(config["num_patches"], "num_patches", 1, MAX_GRID**2, where)
    patch = bounded(config["patch_size"], "patch_size", 1, MAX_PATCH, where)
    side = math.isqrt(count)
    if side**2 != count:
        raise UserError(f"{where}: num_patches is {count}, which is no square grid.")
    return config | {"image_size": side * patch}


def linear(kernel: np.ndarray) -> np.ndarray:
    """Return the weight [D, P * P * 3] of the patch embedding, given ours."""
    return np.ascontiguousarray(kernel.T)


FAMILY = dataclasses.replace(
    siglip.FAMILY,
    name="SigLIP 2",
    defaults={**siglip.FAMILY.defaults, "num_patches": 256},
    complete=complete,
    layout=NAFLEX,
)
