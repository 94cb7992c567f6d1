"""Settings that sweeps share: small models and simple scenes, for the CPU of a laptop."""

from typing import Any

# As in configs/quickstart.py.
EASY_SCENES: dict[str, Any] = {
    "data.image_size": 48,
    "data.scenes.max_objects": 2,
    "data.scenes.smallest": 0.2,
    "data.scenes.shapes": 4,
    "data.scenes.patterns": False,
    "data.scenes.backgrounds": False,
    "data.scenes.plain_captions": True,
    "data.scenes.synonyms": False,
    "text.vocab_size": 128,
    "text.length": 12,
}
FULL_SCENES: dict[str, Any] = {"text.vocab_size": 512, "text.length": 48}

RECIPE: dict[str, Any] = {
    "optim.name": "adamw",
    "optim.weight_decay": 0.01,
    "optim.warmup_share": 0.05,
    "eval.every_share": 1.0,
    "checkpoint.every_share": 0.25,
    "checkpoint.keep_last": 1,
}


def model(size: str) -> dict[str, Any]:
    """Return the fields of a named size or "WIDTHxDEPTH" (12-pixel patches, 16-wide heads)."""
    width, by, depth = size.partition("x")
    if not by:
        return {"model.name": size}
    return {
        "model.name": "mu/12",
        "model.width": int(width),
        "model.depth": int(depth),
        "model.mlp": 4 * int(width),
        "model.heads": int(width) // 16,
    }
