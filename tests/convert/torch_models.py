"""Small models of `transformers` with random parameters, and their outputs."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from cap_pretrain.convert import Pretrained
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.layers import normalize_images
from tests import tiny
from tests.parity import require

torch = require("torch")

SIDE, PATCH = 24, 8
VISION = {
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT = VISION | {"vocab_size": 50, "max_position_embeddings": 8}


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Randomize parameters initialized to zero or one, so that each affects the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            scale = "norm" in name and name.endswith("weight")
            p.copy_(1 + 0.3 * noise if scale else noise / max(p.shape[-1:], default=1) ** 0.5)
    return model.eval().requires_grad_(False)


def save(model: torch.nn.Module, folder: Path, **options: Any) -> Path:
    """Save a model of transformers."""
    model.save_pretrained(folder, **options)
    return folder


def pixels(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Convert [B, H, W, 3] uint8 images to the input of transformers, [B, 3, H, W]."""
    values = (images.astype(np.float64) / 255 - mean) / std
    return torch.from_numpy(values.transpose(0, 3, 1, 2).astype(np.float32))


def encode(pretrained: Pretrained, images: np.ndarray):
    """Return the EncoderOutput of an imported encoder, built from its config fields."""
    config = tiny.config(**pretrained.model)
    config.data.image_size = pretrained.image_size
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: build_encoder(config, nnx.Rngs(0))))

    @jax.jit
    def run(params, images):
        return nnx.merge(graphdef, params)(normalize_images(images, np.float32))

    return run(pretrained.params, images)
