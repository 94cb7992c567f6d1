"""What a sweep consists of: trials, each a run of the training program in a folder of its own.

A sweep file, `configs/sweeps/NAME.py`, has a function `sweep(arg=None)` that yields a `Trial` for
each run; `arg` is what follows the colon of `NAME.py:key=value,…`, as for configs.
"""

import ast
import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import files
from cap_pretrain.checkpoints.checkpoint import saved_steps
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.training.changes import check_unchanged

# In the folder of a sweep: its trials. In that of a trial: the config that was asked for, before
# the run took over what its data and its encoder settle; how far it is; what it printed.
SWEEP_FILE, ASKED_FILE, RECORD_FILE, LOG_FILE = "sweep.json", "asked.json", "trial.json", "log.txt"

NAME = re.compile(r"[\w.=+-]+")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
      name: of its folder.
      config: a config file with its arguments, FILE[:key=value,…].
      overrides: fields of that config, as "optim.lr", and their values.
    """

    name: str
    config: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fields(self) -> dict[str, Any]:
        """What tells this trial from others: arguments of the config, and overrides."""
        arguments = (part.partition("=") for part in self.config.partition(":")[2].split(","))
        return {key: value for key, _, value in arguments if key} | dict(self.overrides)

    def resolved(self) -> ConfigDict:
        """The config of the trial.

        Raises:
          UserError: there is no such config, or an override does not fit it.
        """
        file, _, arg = self.config.partition(":")
        get_config = _function(Path(file), "get_config")
        config = get_config(arg) if arg else get_config()
        for field, value in self.overrides.items():
            try:
                config.update_from_flattened_dict({field: value})
            except (KeyError, AttributeError) as error:
                said = str(error.args[0]).partition(" Other fields")[0].rstrip(".")
                raise UserError(f"trial {self.name}: no field {field!r} ({said}).") from error
            except (TypeError, ValueError) as error:
                raise UserError(f"trial {self.name}: {field}={value!r}: {error}") from error
        return config

    def arguments(self, folder: Path) -> list[str]:
        """The command line of the training program, for the trial in `folder`."""
        set_fields = [f"--config.{field}={value}" for field, value in self.overrides.items()]
        return [f"--config={self.config}", *set_fields, f"--workdir={folder}"]


def load(sweep: str, extra: Mapping[str, Any]) -> list[Trial]:
    """Returns the trials of a sweep file, each with further overrides.

    Args:
      sweep: FILE[:key=value,…].
      extra: fields that are set in all trials, whatever the sweep says of them.

    Raises:
      UserError: there is no such file, it yields nothing, or trials of the same name.
    """
    file, _, arg = sweep.partition(":")
    function = _function(Path(file), "sweep")
    trials = [
        dataclasses.replace(trial, overrides={**trial.overrides, **extra})
        for trial in (function(arg) if arg else function())
    ]
    names = [trial.name for trial in trials]
    if not trials:
        raise UserError(f"{sweep}: has no trials.")
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(f"{sweep}: {name!r} is no name of a folder; write it without that.")
        if names.count(name) > 1:
            raise UserError(f"{sweep}: {names.count(name)} trials are called {name!r}.")
    return trials


def parse_overrides(arguments: Iterable[str]) -> dict[str, Any]:
    """["--config.optim.lr=0.01"] -> {"optim.lr": 0.01}. Raises UserError for other arguments."""
    overrides = {}
    for argument in arguments:
        field, equals, text = argument.removeprefix("--config.").partition("=")
        if not (equals and argument.startswith("--config.")):
            raise UserError(f"{argument!r}: after -- there may be --config.some.field=value only.")
        try:
            overrides[field] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            overrides[field] = text
    return overrides


def matching(trials: Sequence[Trial], pattern: str) -> list[Trial]:
    """The trials whose names match a pattern as of shells. Raises UserError if none does."""
    found = [trial for trial in trials if fnmatchcase(trial.name, pattern)]
    if not found:
        near = did_you_mean(pattern, (trial.name for trial in trials))
        raise UserError(f"--only: no trial is called {pattern!r}.{near}")
    return found


def prepare(trials: Sequence[Trial], out: Path) -> None:
    """Writes down in `out` which trials there are, after making sure that none has changed.

    Trials of another sweep that have a folder here stay on the list. A trial may change as long as
    nothing is saved of it.

    Raises:
      UserError: a trial has no valid config, or another one than it began with.
    """
    resolved = {trial.name: trial.resolved() for trial in trials}
    for name, config in resolved.items():
        folder = out / name
        if record(folder).get("state") == "finished" or saved_steps(folder):
            asked = folder / ASKED_FILE
            if asked.exists():
                check_unchanged(config, asked)
    files.make_workdir(out)
    earlier = read(out) if (out / SWEEP_FILE).exists() else []
    listed = {trial.name: trial for trial in earlier if (out / trial.name).is_dir()}
    listed |= {trial.name: trial for trial in trials}
    listing = [dataclasses.asdict(trial) for trial in listed.values()]
    files.write_text(out / SWEEP_FILE, json.dumps(listing, indent=2) + "\n")
    for name, config in resolved.items():
        files.write_text(out / name / ASKED_FILE, configs.to_json(config))


def read(out: Path) -> list[Trial]:
    """Returns the trials of the sweep in a folder. Raises UserError if it is none."""
    path = out / SWEEP_FILE
    if not path.exists():
        raise UserError(f"{out}: is no folder of a sweep (it has no {SWEEP_FILE}).")
    try:
        return [Trial(**trial) for trial in files.read_json(path)]
    except TypeError as error:
        raise UserError(f"{path}: is no list of trials ({error}).") from error


def record(folder: Path) -> dict[str, Any]:
    """What the runner has written down of a trial; empty if it was never started.

    Its fields: `state` (running, finished, failed or stopped), `starts`, `code` (exit status),
    `reason` (why it failed) and `seconds` (of all starts together).
    """
    path = folder / RECORD_FILE
    return files.read_json(path) if path.exists() else {}


def _function(file: Path, name: str) -> Any:
    """A function of a Python file. Raises UserError if there is none."""
    if not file.is_file():
        near = did_you_mean(str(file), map(str, file.parent.glob("*.py")))
        raise UserError(f"there is no file {str(file)!r}.{near}")
    spec = importlib.util.spec_from_file_location(f"_{file.stem}", file)
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise UserError(f"{file}: has no function {name}().")
    return getattr(module, name)
