"""Saving and restoring the training state with Orbax, in `WORKDIR/checkpoints/STEP/`.

A checkpoint has two parts: `learner` (what evaluation and export need) and `optimizer`. Orbax
writes to a temporary folder and renames it when complete: an interrupted save harms no older one.
"""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from cap_pretrain.errors import UserError
from cap_pretrain.step import TrainState


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's folder.
      config: gives what is kept.
      read_only: for evaluation and export of somebody's run.
    """

    def __init__(self, workdir: str | Path, config: ConfigDict, *, read_only: bool = False):
        keep_every = config.checkpoint.keep_every_steps
        self._manager = ocp.CheckpointManager(
            (Path(workdir) / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.checkpoint.keep_last,
                keep_period=keep_every or None,
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Begins to save; training may go on at once."""
        learner, optimizer = _parts(state)
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                learner=ocp.args.StandardSave(learner),
                optimizer=ocp.args.StandardSave(optimizer),
            ),
        )

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """Returns the state saved at `step`, laid out as `abstract` says.

        Raises:
          UserError: the checkpoint holds another model or optimizer than the config describes.
        """
        learner, optimizer = _parts(abstract)
        try:
            saved = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    learner=ocp.args.StandardRestore(learner),
                    optimizer=ocp.args.StandardRestore(optimizer),
                ),
            )
        except (ValueError, KeyError, TypeError) as e:
            reason = (str(e).strip() or repr(e)).splitlines()[0]
            raise UserError(
                f"{self._manager.directory / str(step)}: does not hold the model of this config "
                f"({reason[:200]}). Use another --workdir or the config it was made with."
            ) from e
        return TrainState(**saved["learner"], opt_state=saved["optimizer"]["opt_state"])

    def close(self) -> None:
        """Waits for a save under way and lets go."""
        self._manager.wait_until_finished()
        self._manager.close()


def _parts(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    learner = {
        "step": state.step,
        "params": state.params,
        "stats": state.stats,
        "ema": state.ema,
    }
    return learner, {"opt_state": state.opt_state}
