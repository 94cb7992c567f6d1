"""Settings that sweeps share: small models and simple scenes, for the CPU of a laptop."""

from typing import Any

from cap_pretrain.errors import UserError

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


_KINDS: dict[Any, str] = {int: "a whole number", float: "a number"}


def values(field: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """Return the values of an argument "A+B+…" of a sweep; raise UserError if one is no `kind`."""
    found = []
    for part in text.split("+"):
        try:
            found.append(kind(part))
        except ValueError as error:
            raise UserError(f"{field}={text}: {part!r} is not {_KINDS[kind]}.") from error
    return found
