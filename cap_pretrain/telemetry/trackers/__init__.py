"""Trackers: experiment trackers that receive the figures of a run besides TensorBoard.

A tracker is a class with the methods of `base.Tracker`; `Tracker(run, identity)` opens it. To add
one, write a module and register its class and its package below. `config.log.trackers` then accepts
its name. `guard.Guarded` calls it from a thread of its own, so that it can neither end nor delay a
run.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from cap_pretrain import files
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.telemetry.trackers.base import Run, Tracker
from cap_pretrain.telemetry.trackers.guard import Guarded, one_line
from cap_pretrain.untrusted import checked

TENSORBOARD = "tensorboard"  # always written, by `MetricsWriter`
IDENTITIES = "trackers.json"  # in the workdir: the run's id by name of the tracker


class Entry(NamedTuple):
    """A tracker that can be named; the package that it needs has its name, and so has its extra."""

    path: str  # MODULE:CLASS
    silence: (
        str  # variable that, if unset, is set so that the package reports no usage to its makers
    )
    value: str  # of that variable


_HERE = "cap_pretrain.telemetry.trackers"
REGISTRY = {
    "wandb": Entry(f"{_HERE}.wandb:Wandb", "WANDB_ERROR_REPORTING", "false"),
    "mlflow": Entry(f"{_HERE}.mlflow:Mlflow", "MLFLOW_DISABLE_TELEMETRY", "true"),
}


def parse(names: str) -> tuple[str, ...]:
    """Return the trackers in "tensorboard+wandb+…" besides TensorBoard, which is always written.

    Raises UserError for an unknown name.
    """
    known = {TENSORBOARD, *REGISTRY}
    found = dict.fromkeys(filter(None, (name.strip() for name in names.split("+"))))
    for name in found:
        if name not in known:
            raise UserError(f"log.trackers: no tracker {name!r}.{did_you_mean(name, known)}")
    return tuple(name for name in found if name != TENSORBOARD)


def check(names: str) -> None:
    """Raise UserError if a tracker is unknown or its package is not installed."""
    for name in parse(names):
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin:  # none, or a mere folder of that name, as wandb leaves
            raise UserError(
                f"log.trackers: the package of {name} is not installed; run "
                f"pip install 'cap_pretrain[{name}]', or leave {name} out."
            )


def start(names: str, run: Run, say: Callable[[str], None]) -> list[Guarded]:
    """Open the trackers of a run, each continuing its own run of an earlier start.

    One that cannot be opened is left out, and `say` gets a line about it.
    """
    path = run.workdir / IDENTITIES
    identities: dict[str, Any] = {}
    opened = []
    for name in parse(names):
        try:
            if path.exists():
                identities = checked(files.read_json(path), "content", dict, path)
            earlier = checked(identities.get(name), name, (str, type(None)), path)
            tracker = _open(name, run, earlier)
        except (Exception, SystemExit) as e:  # packages of this kind may raise anything
            say(f"{name}: could not be opened and gets nothing; the run goes on: {one_line(e)}")
            continue
        identities = identities | {name: tracker.identity}
        files.write_text(path, json.dumps(identities) + "\n")
        opened.append(Guarded(name, tracker, run, tracker.identity == earlier, say))
    return opened


def _open(name: str, run: Run, identity: str | None) -> Tracker:
    path, variable, value = REGISTRY[name]
    os.environ.setdefault(variable, value)
    module, _, cls = path.partition(":")
    return getattr(importlib.import_module(module), cls)(run, identity)
