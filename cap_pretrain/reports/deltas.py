"""Configs as differences: from the default, and between runs."""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from cap_pretrain import config as configs
from cap_pretrain import evals, learners
from cap_pretrain.errors import UserError
from cap_pretrain.reports.workdir import Run, section

Fields = dict[str, Any]
"""Values by the names of fields, such as "optim.lr"."""

ABSENT = "—"

LONGEST = 200
"""Characters of a value that are shown."""


def from_default(config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ from the default, with their value and the default.

    Fields of a learner and of an evaluator are compared with the defaults of that one; `ABSENT`
    stands for a field that one side lacks.
    """
    own, default = configs.fields(config), _defaults(config)
    names = [name for name in own if own[name] != default.get(name, ABSENT)]
    return {name: (own[name], default.get(name, ABSENT)) for name in names}


def _defaults(config: dict[str, Any]) -> Fields:
    """Return the default of every field that a config with this learner and evaluators has."""
    default = configs.default()
    with default.unlocked():
        with contextlib.suppress(UserError):  # a learner of another version
            default.learner = learners.defaults_like(section(config, "learner"))
        for name, own in section(config, "evals").items():
            evaluator = own.get("evaluator") if isinstance(own, dict) else None
            if isinstance(evaluator, str) and evaluator in evals.REGISTRY:
                default.evals[name] = evals.defaults(evaluator)
    try:
        found = configs.fields(json.loads(configs.to_json(default)))
    except (UserError, ValueError):
        return {}
    # Which learner and evaluators there are is itself a choice.
    chosen = {"learner.name": configs.default().learner.name}
    kept = {name: value for name, value in found.items() if not name.endswith(".evaluator")}
    return kept | chosen


def between(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the fields in which runs differ, with the value in each, `ABSENT` if it has none.

    Of a learner or evaluator that some runs lack, only fields that are not at their default count.
    """
    flat = [configs.fields(run.config) for run in runs]
    changed = {name for run in runs for name in from_default(run.config)}
    names = dict.fromkeys(name for own in flat for name in own)
    found = {}
    for name in names:
        values = [own.get(name, ABSENT) for own in flat]
        everywhere = all(name in own for own in flat)
        if any(v != values[0] for v in values) and (everywhere or name in changed):
            found[name] = values
    return found


def written(value: Any) -> str:
    """Return the value of a field as text, cut if it is longer than LONGEST."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
