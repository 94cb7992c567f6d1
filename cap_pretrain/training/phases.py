"""The phases of a run: ranges of steps that one compiled program computes.

What changes at some step and needs another program (the size of the images, the number of tokens,
which parts of a learner train) begins a phase. A phase is the config of the run with other values
in a few fields. The parameters and the optimizer are the same in all phases, so the state and its
checkpoints do not depend on them, and a resumed run continues in the phase of its step.
"""

import dataclasses
import itertools
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain.config import get
from cap_pretrain.data import resolution
from cap_pretrain.learners import learner_class
from cap_pretrain.models import tokens

Changes = list[tuple[float, dict[str, Any]]]
"""Pairs (share of the run, values of fields from there on)."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A range of steps.

    Attributes:
        start: Number of steps before the phase.
        stop: Number of steps up to its end.
        config: The config of the run with the fields of the phase.
        changed: These fields, and their values where they are not those of the run's config.
    """

    start: int
    stop: int
    config: ConfigDict
    changed: dict[str, Any]

    def describe(self) -> str:
        """Return what distinguishes the phase, as "images of 84 px, model.keep_tokens=0.5"."""
        others = {field: v for field, v in self.changed.items() if field != resolution.FIELD}
        side = f"images of {resolution.training_side(self.config)} px"
        return ", ".join([side, *(f"{field}={value}" for field, value in others.items())])


def changes(config: ConfigDict) -> Changes:
    """Return all fields that change during a run, by the share of the run, ascending."""
    found: Changes = [*resolution.changes(config), *tokens.changes(config)]
    own = getattr(learner_class(config.learner.name), "changes", None)
    found += own(config) if own else []
    return sorted(found, key=lambda change: change[0])


def phases_of(config: ConfigDict, total: int) -> list[Phase]:
    """Return the phases of a run of `total` steps, in order; phases without steps are left out.

    A phase begins at its share of `total`, rounded to whole steps. Where nothing changes, the only
    phase has `config` itself.
    """
    values: dict[str, Any] = {}
    starts: dict[int, dict[str, Any]] = {0: {}}
    for share, fields in changes(config):
        values = values | fields
        changed = {field: v for field, v in values.items() if v != get(config, field)}
        starts[round(round(share * total, 6))] = changed
    # Steps where something changes; the last ones may be beyond the end, or change nothing.
    kept: dict[int, dict[str, Any]] = {}
    for start in sorted(step for step in starts if step < max(total, 1)):
        if not kept or starts[start] != list(kept.values())[-1]:
            kept[start] = starts[start]
    bounds = itertools.pairwise([*kept, total])
    return [Phase(*bound, _with(config, kept[bound[0]]), kept[bound[0]]) for bound in bounds]


def _with(config: ConfigDict, changed: dict[str, Any]) -> ConfigDict:
    """Return the config with other values in some fields; `config` itself if there are none."""
    if changed:
        config = config.copy_and_resolve_references()
        config.update_from_flattened_dict(changed)
    return config
