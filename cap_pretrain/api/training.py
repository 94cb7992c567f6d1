"""`cap_pretrain.train`: what the command line does, from Python."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import files
from cap_pretrain.api.loading import load
from cap_pretrain.api.model import Model
from cap_pretrain.checkpoints.folders import saved_steps
from cap_pretrain.cli import config_files
from cap_pretrain.distributed import determinism, gpu, heartbeat
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.telemetry.metrics import read_metrics
from cap_pretrain.train import run
from cap_pretrain.training.changes import fields


class Trained(NamedTuple):
    """A finished run: its workdir, its last step, and the last value of each of its metrics."""

    workdir: str
    step: int
    metrics: dict[str, float]

    def load(self) -> Model:
        """Load the trained model."""
        return load(self.workdir)


def train(
    config: str | ConfigDict,
    workdir: str | os.PathLike[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    allow_changes: Sequence[str] = (),
) -> Trained:
    """Train as a config says, like `python -m cap_pretrain.main`; a stopped run resumes.

    Args:
        config: A config; or the name of one in configs/ or the path of a config file, with its
            arguments, such as "quickstart" or "pretrain:objective=cap,data=data/mine". A config
            that is passed is not changed.
        workdir: Folder of everything that the run writes, or gs://BUCKET/FOLDER.
        overrides: Values by field, such as {"total_steps": 100, "optim.lr": 1e-3}.
        allow_changes: Fields that may differ from an earlier start in the same workdir.

    Returns:
        Where the run is, and its final metrics.

    Raises:
        UserError: A mistake in the config, its data or the workdir.
        cap_pretrain.training.watch.Stopped: SIGTERM or Ctrl-C ended the run, after saving.
    """
    if isinstance(config, str):
        config = config_files.config(config)
    elif not isinstance(config, ConfigDict):
        raise TypeError(
            f"config: found a {type(config).__name__}; give the name of a config or a ConfigDict."
        )
    try:
        place = files.place(workdir).expanduser()
    except UserError as error:
        raise UserError(f"workdir: {error}") from error
    config = changed(config, overrides or {})
    determinism.set_environment(config)
    gpu.set_environment()
    with heartbeat.watched():
        run(config, place, allow_changes, tuple(overrides or {}))
    metrics: dict[str, float] = {}
    for line in read_metrics(place):
        metrics |= line
    metrics.pop("step", None)
    steps = saved_steps(place)
    return Trained(str(place), steps[-1] if steps else 0, metrics)


def changed(config: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """Return a locked copy of a config with values by field, such as {"optim.lr": 1e-3}.

    Raises UserError for a field that does not exist, or a value of another type.
    """
    config = config.copy_and_resolve_references()
    known = fields(config.to_dict())
    with config.unlocked():
        for field, value in overrides.items():
            if field not in known:
                raise UserError(f"overrides: no field {field!r}.{did_you_mean(field, known)}")
            *sections, last = field.split(".")
            section = configs.get(config, ".".join(sections)) if sections else config
            try:
                section[last] = value
            except TypeError as error:
                raise UserError(
                    f"overrides: {field} must be of type {type(known[field]).__name__}, found "
                    f"{value!r}."
                ) from error
    return config.lock()
