"""Whether a run goes on with the config that it began with, and which changes it may have."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import learners
from cap_pretrain.errors import UserError


def check_unchanged(config: ConfigDict, path: Path, allowed: Sequence[str] = ()) -> list[str]:
    """Compares a config with the one stored at `path`, with which the run in that folder began.

    Fields in `config.FREE` may differ. Fields that one of the two lacks count with their default.

    Args:
      config: the present one.
      path: a config.json.
      allowed: fields or sections that may differ too; "all" stands for every one.

    Returns:
      What has changed and was allowed to, a line each.

    Raises:
      UserError: another field differs, or the file is no JSON object.
    """
    try:
        then = fields(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as e:
        raise UserError(
            f"{path}: is not readable JSON, so what the run began with is not known. Put it back, "
            "or remove it to go on with the present config."
        ) from e
    now = fields(json.loads(configs.to_json(config)))
    usual = configs.default()
    with usual.unlocked():
        usual.learner = learners.defaults(config.learner.name)
    usual = fields(json.loads(configs.to_json(usual)))
    changed = {}
    for field in sorted({*then, *now}):
        values = [side.get(field, usual.get(field)) for side in (then, now)]
        if values[0] != values[1] and not _covered(field, configs.FREE):
            changed[field] = f"{field} was {values[0]!r}, is now {values[1]!r}"
    refused = [f for f in changed if not (_covered(f, allowed) or "all" in allowed)]
    if refused:
        raise UserError(
            f"{path}: the run began with another config: {'; '.join(map(changed.get, refused))}.\n"
            "Put it back, use another --workdir, or go on with "
            f"--allow_changes={','.join(refused)}."
        )
    return list(changed.values())


def fields(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a config read from JSON: {"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    found = {}
    for name, value in section.items():
        inside = fields(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        found |= {prefix + name: value} if inside is None else inside
    return found


def _covered(field: str, names: Sequence[str]) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in names)
