"""`cap_pretrain.load`."""

import os
from collections.abc import Sequence

import jax

from cap_pretrain.api.model import Model
from cap_pretrain.checkpoints.load import make_mesh
from cap_pretrain.checkpoints.open import open_learner


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    part: str = "",
    devices: Sequence[jax.Device] | None = None,
) -> Model:
    """Load a trained model, with averaged parameters if its run kept them.

    Args:
        path: The workdir of a run (its newest valid checkpoint), a checkpoint such as
            runs/cappa/checkpoints/300, a folder from tools/export_encoder.py, or whatever else
            `--config.encoder` takes: a folder of transformers with a CLIP, SigLIP or ViT, OpenAI's
            or OpenCLIP's CLIP, or torchvision's ResNet or AlexNet. Each may be in a bucket, as
            gs://BUCKET/FOLDER; nothing else is downloaded.
        step: Checkpoint of a workdir.
        part: A part of a joint learner, as "cap" of cap+siglip, as if it had been trained alone.
            "" is all of it: each method uses a part that can.
        devices: Devices that share the work, by default all of this process; each holds the whole
            model.

    Raises:
        UserError: The model or part does not exist, or its files do not fit together.
    """
    mesh = make_mesh(jax.local_devices() if devices is None else list(devices))
    learner = open_learner(path, step, mesh)
    return Model((learner.able(object, part) or learner) if part else learner, os.fspath(path))
