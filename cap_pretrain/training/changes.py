"""Compare the config of a resumed run with that of its earlier start."""

import contextlib
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import files, learners, untrusted
from cap_pretrain.config import fields
from cap_pretrain.data.text import byte_pairs, words
from cap_pretrain.errors import UserError
from cap_pretrain.optim import optimizers
from cap_pretrain.validation import FREE

BLOCKS = ("data.order", "data.block", "data.lanes", "data.cache_gb")

# Fields that decide which examples follow each other.
ORDER = (
    *("seed", "data.name", "data.split", "data.fraction", "data.class_min", "data.class_max"),
    *("data.buckets", "data.held_out", "data.scenes", *BLOCKS),
)


def reordering(changes: Sequence[str]) -> list[str]:
    """Return a line for the log if `changes`, from `check_unchanged`, reorder the examples."""
    changed = [change.partition(" ")[0] for change in changes]
    fields = ", ".join(field for field in changed if _covered(field, ORDER))
    note = "changes the order of the examples: this epoch may repeat some and leave others out."
    return [f"{fields} {note}"] if fields else []


def check_unchanged(config: ConfigDict, path: Path, allowed: Sequence[str] = ()) -> list[str]:
    """Compare a config with the one that an earlier start stored at `path`; return the changes.

    Fields in `validation.FREE` may differ, and so may `allowed` fields or sections ("all": every
    field), whose changes are returned, one line each. A field missing on one side counts with its
    default. Raises UserError if another field differs, or the file is not a JSON object.
    """
    try:
        then = fields(untrusted.checked(files.read_json(path), "config", dict, path))
    except (UserError, RecursionError) as e:
        raise UserError(
            f"{path}: is not readable JSON, so the config of the run is unknown. Restore the file, "
            "or remove it to resume with the present config."
        ) from e
    now = fields(json.loads(configs.to_json(config)))
    then.setdefault("data.order", "global")
    if not configs.trains(config) or then["data.order"] == "auto":  # not settled, or not read
        then |= {field: now[field] for field in BLOCKS}
    default = configs.default()
    with default.unlocked():
        default.learner = learners.defaults_like(config.learner.to_dict())
    defaults = fields(json.loads(configs.to_json(default)))
    changed = {}
    for field in sorted({*then, *now}):
        old, new = (side.get(field, defaults.get(field)) for side in (then, now))
        if old != new and not _covered(field, FREE):
            changed[field] = f"{field} was {old!r}, is now {new!r}"
    refused = {f: c for f, c in changed.items() if not (_covered(f, allowed) or "all" in allowed)}
    if refused:
        raise UserError(
            f"{path}: the run began with another config: {'; '.join(refused.values())}.\n"
            "Restore it, use another --workdir, or resume with "
            f"--allow_changes={','.join(refused)}."
        )
    return list(changed.values())


def with_earlier_order(config: ConfigDict, path: Path) -> ConfigDict:
    """Return the config with the order of examples of the run whose config is stored at `path`.

    A run that began before `data.order` existed, in 0.1, keeps the shuffle of all examples, also
    where the automatic choice would now be another one.
    """
    if config.data.order != "auto" or not path.is_file():
        return config
    with contextlib.suppress(UserError):  # `check_unchanged` says what is wrong with the file
        stored = fields(untrusted.checked(files.read_json(path), "config", dict, path))
        if "data.name" in stored and "data.order" not in stored:
            config = config.copy_and_resolve_references()
            config.data.order = "global"
    return config


def binding(config: ConfigDict) -> dict[str, Any]:
    """Return the fields of a config that may not change between two starts, as JSON values."""
    found = fields(json.loads(configs.to_json(config)))
    return {field: value for field, value in found.items() if not _covered(field, FREE)}


# Fields that only training reads.
TRAINING = (
    *("accumulate", "batch_size", "checkpoint", "eval", "log", "optim", "plateau"),
    *("data.buckets", "data.first_sizes", "data.flip", "data.fraction", "data.max_broken"),
    *BLOCKS,
    *("model.dropout", "model.stochastic_depth"),
    *("model.keep_tokens", "model.keep_tokens_at", "model.keep_tokens_until"),
)


def unused(config: ConfigDict, given: Collection[str]) -> list[str]:
    """Return a line if fields in `given`, from the command line, have no effect with this config.

    Fields at their defaults are left out, and so is total_…, about which `schedule.describe` says
    the same.
    """
    text, learner = config.text, config.learner.name
    of_words = words.is_words_file(text.tokenizer) if text.tokenizer else text.kind == "words"
    of_pairs = text.tokenizer and byte_pairs.is_byte_pairs_file(text.tokenizer)
    reasons: dict[str, Sequence[str]] = {
        "the run has no steps": () if configs.trains(config) else TRAINING,
        f"{learner} reads no text": ("text", "data.caption_lengths", "data.caption_prefixes")
        * ("text" not in learners.reads(config)),
        "text.tokenizer is given": ("text.kind", "text.vocab_size", "text.words")
        * bool(text.tokenizer),
        f"{learner} reads no boxes": ("data.regions",) * ("boxes" not in learners.reads(config)),
        "the tokenizer is CLIP's": ("text.lower", "text.punctuation") * bool(of_pairs),
        "the tokenizer has whole words": (
            "text.punctuation",
            *("text.lower",) * bool(text.tokenizer),
        )
        * of_words,
        f"text.kind is {text.kind}": ("text.vocab_size" if text.kind == "words" else "text.words",),
        "data.order is global": ("data.block", "data.lanes", "data.cache_gb")
        * (config.data.order == "global"),
        f"optim.name is {config.optim.name}": ("optim.muon",) * (config.optim.name != "muon"),
        "model.keep_tokens is 1": ("model.keep_tokens_at", "model.keep_tokens_until")
        * (config.model.keep_tokens == 1),
        "optim.mup.base_width is 0": ("optim.mup",) * (not config.optim.mup.base_width),
        "plateau.figure is empty": ("plateau",) * (not config.plateau.figure),
        "checkpoint.best is empty": ("checkpoint.best_mode",) * (not config.checkpoint.best),
    }
    units = ("steps", "examples", "epochs", "share")
    for name in ("optim.warmup", "optim.cooldown", "checkpoint.every", "eval.every", "log.every"):
        for number, unit in enumerate(units):
            if configs.get(config, f"{name}_{unit}"):
                reasons[f"{name}_{unit} counts"] = [f"{name}_{u}" for u in units[number + 1 :]]
                break
    if config.optim.decay not in optimizers.COOLED:
        reasons[f"optim.decay is {config.optim.decay}"] = [f"optim.cooldown_{u}" for u in units]
    default = fields(configs.default().to_dict())
    found: dict[str, str] = {}
    for reason, names in reasons.items():
        for field in given:
            if _covered(field, names) and configs.get(config, field) != default.get(field):
                found.setdefault(field, f"{field}={configs.get(config, field)!r} ({reason})")
    return [f"Given on the command line, but not used: {', '.join(found.values())}."] * bool(found)


def _covered(field: str, names: Sequence[str]) -> bool:
    # An option of a part is also one of the learner that it is.
    fields = {field, re.sub(r"^learner\.parts\.\w+\.", "learner.", field)}
    return any(own == name or own.startswith(f"{name}.") for own in fields for name in names)
