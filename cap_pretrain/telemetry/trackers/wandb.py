"""Weights & Biases. Its own variables choose mode, project and account (docs/trackers.md)."""

import os
import secrets
from collections.abc import Mapping, Sequence

import numpy as np
import wandb

from cap_pretrain.telemetry.trackers.base import PROJECT, Run

INIT_S = 60.0
"""Seconds to wait for the server at the start."""


class Wandb:
    """A run of Weights & Biases, whose files are in WORKDIR/wandb; see `base.Tracker`."""

    def __init__(self, run: Run, identity: str | None) -> None:
        self.identity = identity or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or run.name,
            id=self.identity,
            resume="allow",
            dir=str(run.folder),
            config=run.fields(),
            allow_val_change=True,
            # The console goes to the user's own log, and code stays where it is.
            settings=wandb.Settings(console="off", save_code=False, init_timeout=INIT_S),
        )
        # Steps as a figure, since wandb drops what comes after a later one of its own steps.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `base.Tracker`."""
        self._run.log({**values, "step": step})

    def text(self, step: int, tag: str, text: str) -> None:
        """See `base.Tracker`."""
        self._run.log({f"{tag}/text": text, "step": step})

    def images(self, step: int, tag: str, images: np.ndarray, captions: Sequence[str]) -> None:
        """See `base.Tracker`."""
        pairs = zip(images, captions, strict=True)
        samples = [wandb.Image(image, caption=caption) for image, caption in pairs]
        self._run.log({f"{tag}/samples": samples, "step": step})

    def close(self, failed: bool) -> None:
        """See `base.Tracker`."""
        self._run.finish(exit_code=int(failed))
