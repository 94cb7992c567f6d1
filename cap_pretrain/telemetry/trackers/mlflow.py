"""MLflow. Its own variables choose server, experiment and account (docs/trackers.md)."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mlflow import MlflowClient, MlflowException
from mlflow.entities import Metric, Param

from cap_pretrain.telemetry.trackers.base import PROJECT, Run

URI, EXPERIMENT = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"

PARAMS, PARAM_LENGTH = 100, 500
"""Parameters per call, and characters of a value, that every server accepts (MLflow's REST API)."""


class Mlflow:
    """A run of MLflow, by default in WORKDIR/mlflow.db (`Run.folder`); see `base.Tracker`."""

    def __init__(self, run: Run, identity: str | None) -> None:
        workdir = run.folder.absolute()
        local = not os.environ.get(URI)
        uri = f"sqlite:///{workdir}/mlflow.db" if local else os.environ[URI]
        # Creating a local store is no news.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=uri)
        if identity and self._continued(identity):
            self.identity = identity
            return
        name = os.environ.get(EXPERIMENT) or PROJECT
        experiment = self._client.get_experiment_by_name(name)
        artifacts = (workdir / "mlflow").as_uri() if local else None
        number = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(name, artifact_location=artifacts)
        )
        self.identity = self._client.create_run(number, run_name=run.name).info.run_id
        params = [Param(k, str(v)[:PARAM_LENGTH]) for k, v in run.fields().items()]
        for at in range(0, len(params), PARAMS):
            self._client.log_batch(self.identity, params=params[at : at + PARAMS])
        self._client.log_dict(self.identity, run.fields(), "config.json")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `base.Tracker`."""
        now = int(1000 * time.time())
        metrics = [Metric(tag, float(value), now, step) for tag, value in values.items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def text(self, step: int, tag: str, text: str) -> None:
        """See `base.Tracker`."""
        self._client.log_text(self.identity, text, f"{tag}/{step:08}.md")

    def images(self, step: int, tag: str, images: np.ndarray, captions: Sequence[str]) -> None:
        """See `base.Tracker`; the captions are in a text beside the images."""
        for n, image in enumerate(images, 1):
            self._client.log_image(self.identity, image, artifact_file=f"{tag}/{step:08}/{n}.png")
        lines = "".join(f"{n}. {caption}\n" for n, caption in enumerate(captions, 1))
        self._client.log_text(self.identity, lines, f"{tag}/{step:08}/captions.txt")

    def close(self, failed: bool) -> None:
        """See `base.Tracker`."""
        self._client.set_terminated(self.identity, status="FAILED" if failed else "FINISHED")

    def _continued(self, identity: str) -> Any:
        """Set the status of an earlier run to running; return whether it exists."""
        try:
            self._client.get_run(identity)
        except MlflowException as e:
            if e.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        self._client.update_run(identity, status="RUNNING")
        return True
