"""The trials of a sweep, each a run of the training program in its own folder.

A sweep file, `configs/sweeps/NAME.py`, has a function `sweep(arg=None)` that yields a `Trial` for
each run; `arg` is what follows the colon of `NAME.py:key=value,…`, as for configs.
"""

import ast
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import files, untrusted
from cap_pretrain.checkpoints.folders import saved_steps
from cap_pretrain.cli import config_files
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.training.changes import check_unchanged

SWEEP_FILE = "sweep.json"  # In the folder of a sweep: the list of its trials
# In the folder of a trial: the requested config, before the run fills in what its data and encoder
# determine; its status; its output.
REQUESTED_FILE, RECORD_FILE, LOG_FILE = "asked.json", "trial.json", "log.txt"

NAME = re.compile(r"[\w.=+-]+")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep, in the folder `name`.

    `config` is FILE[:key=value,…]; `overrides` are values of its fields by name, as "optim.lr".
    """

    name: str
    config: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fields(self) -> dict[str, Any]:
        """What distinguishes this trial from others: config arguments and overrides, by name."""
        arguments = (part.partition("=") for part in self.config.partition(":")[2].split(","))
        return {key: value for key, _, value in arguments if key} | dict(self.overrides)

    def resolved(self) -> ConfigDict:
        """Return the config; raises UserError if its file is missing or an override is invalid."""
        config = config_files.config(self.config)
        for field, value in self.overrides.items():
            try:
                config.update_from_flattened_dict({field: value})
            except (KeyError, AttributeError) as error:
                reason = str(error.args[0]).partition(" Other fields")[0].rstrip(".")
                raise UserError(f"trial {self.name}: no field {field!r} ({reason}).") from error
            except (TypeError, ValueError) as error:
                raise UserError(f"trial {self.name}: {field}={value!r}: {error}") from error
        return config

    def arguments(self, folder: Path) -> list[str]:
        """Return the arguments of the training program to run the trial in `folder`."""
        set_fields = [f"--config.{field}={value}" for field, value in self.overrides.items()]
        return [f"--config={self.config}", *set_fields, f"--workdir={folder}"]


def load(sweep: str, extra: Mapping[str, Any]) -> list[Trial]:
    """Return the trials of a sweep, FILE[:key=value,…]; the fields `extra` take precedence in all.

    Raises UserError if the file is missing, or has no trials, invalid names, or a name twice.
    """
    file, _, arg = sweep.partition(":")
    function = config_files.load(config_files.find(file, config_files.SWEEPS), "sweep")
    trials = [
        dataclasses.replace(trial, overrides={**trial.overrides, **extra})
        for trial in (function(arg) if arg else function())
    ]
    names = [trial.name for trial in trials]
    if not trials:
        raise UserError(f"{sweep}: has no trials.")
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(
                f"{sweep}: {name!r} is not a valid trial name; use letters, digits and _ . = + -"
            )
        if names.count(name) > 1:
            raise UserError(f"{sweep}: {names.count(name)} trials are called {name!r}.")
    return trials


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """Parse ["--config.optim.lr=0.01"] as {"optim.lr": 0.01}; raises UserError for other forms."""
    overrides: dict[str, Any] = {}
    for argument in arguments:
        field, equals, text = argument.removeprefix("--config.").partition("=")
        if not (equals and argument.startswith("--config.")):
            raise UserError(f"{argument!r}: expected --config.some.field=value after --.")
        try:
            overrides[field] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            overrides[field] = text
    return overrides


def matching(trials: Sequence[Trial], pattern: str) -> list[Trial]:
    """Return the trials whose names match a shell pattern; raises UserError if none does."""
    found = [trial for trial in trials if fnmatchcase(trial.name, pattern)]
    if not found:
        near = did_you_mean(pattern, (trial.name for trial in trials))
        raise UserError(f"--only: no trial matches {pattern!r}.{near}")
    return found


def prepare(trials: Sequence[Trial], out: Path) -> None:
    """Write the list of trials and their configs to `out`, after checking that none has changed.

    Trials of earlier sweeps that have a folder in `out` stay on the list. A trial may change as
    long as it has no checkpoint. Raises UserError if a config is invalid, or differs from the one
    it was started with.
    """
    resolved = {trial.name: trial.resolved() for trial in trials}
    for name, config in resolved.items():
        folder = out / name
        if record(folder).get("state") == "finished" or saved_steps(folder):
            requested = folder / REQUESTED_FILE
            if requested.exists():
                check_unchanged(config, requested)
    files.make_workdir(out)
    earlier = read(out) if (out / SWEEP_FILE).exists() else []
    listed = {trial.name: trial for trial in earlier if (out / trial.name).is_dir()}
    listed |= {trial.name: trial for trial in trials}
    listing = [dataclasses.asdict(trial) for trial in listed.values()]
    files.write_text(out / SWEEP_FILE, json.dumps(listing, indent=2) + "\n")
    for name, config in resolved.items():
        files.write_text(out / name / REQUESTED_FILE, configs.to_json(config))


def read(out: Path) -> list[Trial]:
    """Return the trials of the sweep in a folder; raises UserError without a valid list of them."""
    path = out / SWEEP_FILE
    if not path.exists():
        raise UserError(f"{out}: not the folder of a sweep (it has no {SWEEP_FILE}).")
    try:
        return [Trial(**trial) for trial in files.read_json(path)]
    except TypeError as error:
        raise UserError(f"{path}: not a list of trials ({error}).") from error


def record(folder: Path) -> dict[str, Any]:
    """Return what the runner has recorded about a trial; empty if it was never started.

    Fields: `state` (running, finished, failed or stopped), `starts` (their number), `code` (exit
    status), `reason` (why it failed) and `seconds` (of all starts together).
    """
    path = folder / RECORD_FILE
    return untrusted.checked(files.read_json(path), "record", dict, path) if path.exists() else {}
