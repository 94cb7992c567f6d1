"""What an earlier start of a run has left in its workdir, and its config."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import files
from cap_pretrain.checkpoints.folders import saved_steps
from cap_pretrain.checkpoints.load import read_batch_sizes
from cap_pretrain.training.changes import check_unchanged
from cap_pretrain.training.setup import Earlier


def allowed_changes(config: ConfigDict, workdir: Path, allowed: Sequence[str]) -> list[str]:
    """Return the accepted changes since the run in `workdir`; raise UserError for any other."""
    path = workdir / "config.json"
    binding = saved_steps(workdir) if configs.trains(config) else has_results(workdir)
    if path.exists() and binding:
        return check_unchanged(config, path, allowed)
    return []


def earlier(config: ConfigDict, workdir: Path, allowed: Sequence[str]) -> Earlier:
    """Return what an earlier start has left in `workdir`; raise as `allowed_changes`."""
    changes = allowed_changes(config, workdir, allowed)
    return Earlier(*read_batch_sizes(workdir), changes) if configs.trains(config) else Earlier()


def has_results(workdir: Path) -> bool:
    """Return whether a run has left a checkpoint or a result, which its config.json describes."""
    return bool(saved_steps(workdir)) or any(workdir.glob("evals/*/*.json"))


def keep_config(config: ConfigDict, workdir: Path, start: int) -> None:
    """Write config.json. A previous, different one is kept if the run had results.

    It is then called config.until_STEP.json, or config.until_STEP.2.json if that exists.
    """
    path, data = workdir / "config.json", configs.to_json(config).encode()
    if path.exists() and has_results(workdir) and path.read_bytes() != data:
        files.write_bytes(files.unused(workdir / f"config.until_{start}.json"), path.read_bytes())
    files.write_bytes(path, data)
