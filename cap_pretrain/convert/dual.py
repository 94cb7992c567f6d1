"""Reading back the text tower of a SiglipModel that `export.write_dual_encoder` wrote."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cap_pretrain.convert import siglip
from cap_pretrain.convert.huggingface import CONFIG, LIMITS, WEIGHTS
from cap_pretrain.convert.tables import to_ours
from cap_pretrain.convert.weights import open_folder, read_json
from cap_pretrain.untrusted import bounded, checked, entry

TOKENIZER = "tokenizer.model"
"""The sentencepiece model beside the weights. SigLIP's own folders name it differently, and their
tokenizer also removes punctuation, which ours does not; of them only the encoder is read."""

MAX_LENGTH = 2**16
"""Largest number of tokens of a text that a folder can ask for."""


def text_settings(folder: Path) -> dict[str, Any]:
    """Return `length` and `lower` of `config.text`; {} if the folder holds no text tower of ours.

    Raises UserError if a file in it is damaged.
    """
    where = folder / CONFIG
    if not ((folder / TOKENIZER).is_file() and where.is_file()):
        return {}
    config = read_json(where)
    text, vision = (
        checked(config.get(name) or {}, name, dict, where)
        for name in ("text_config", "vision_config")
    )
    same = text and all(text.get(name) == vision.get(name) for name in LIMITS)
    if not same or config.get("model_type") != "siglip":
        return {}
    length = bounded(
        entry(text, "max_position_embeddings", int, where), "length", 2, MAX_LENGTH, where
    )
    tokenizer = read_json(folder / "tokenizer.json")
    normalizer = checked(tokenizer.get("normalizer") or {}, "normalizer", dict, where)
    steps = checked(normalizer.get("normalizers") or [], "normalizers", list, where)
    return {"length": length, "lower": {"type": "Lowercase"} in steps}


def text_params(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], width: int
) -> dict[str, np.ndarray]:
    """Return the parameters of a dual encoder besides those of its encoder, by path.

    The encoder's pooling head holds the projection of images (see `export.mean_head`), so
    `image_projection` is the identity.

    Args:
        folder: One for which `text_settings` are not empty.
        shapes: Shapes of all parameters of the learner, by path.
        width: Width of the encoder and the text tower.

    Raises:
        UserError: The weights do not fit.
    """
    parts = {"text_tower/": "", "text_projection/": "projection/"}
    inner = {
        path: new + path.removeprefix(own)
        for own, new in parts.items()
        for path in shapes
        if path.startswith(own)
    }
    weights = open_folder(folder, *WEIGHTS)
    scale, bias = weights.take("logit_scale"), weights.take("logit_bias")
    tower = to_ours(
        weights.without("text_model."),
        siglip.TEXT_NAMES,
        {inner[path]: shapes[path] for path in inner},
        ("vision_model.", "logit_scale", "logit_bias"),
    )
    return {path: tower[new] for path, new in inner.items()} | {
        "image_projection/kernel": np.eye(width, dtype=np.float32),
        "image_projection/bias": np.zeros(width, np.float32),
        "log_scale": scale.reshape(()),
        "bias": bias.reshape(()),
    }
