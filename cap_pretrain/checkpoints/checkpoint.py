"""Saving and restoring the training state with Orbax, in `WORKDIR/checkpoints/STEP/`.

A checkpoint has three items: `learner` (what evaluation and export need), `optimizer`, and a
`manifest` with the path, shape, dtype and fingerprint of every array in the other two. Orbax writes
to a temporary folder and renames it when complete: an interrupted save harms no older one. What is
restored is compared with the manifest, so a damaged checkpoint is noticed, whatever the damage, and
told from the checkpoint of another model.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from cap_pretrain import rules
from cap_pretrain.checkpoints.manifest import (
    Damaged,
    compare,
    describe,
    make_manifest,
    read_manifest,
    shape_of,
)
from cap_pretrain.distributed import cluster
from cap_pretrain.errors import UserError, disk_error
from cap_pretrain.fingerprint import fingerprints
from cap_pretrain.training.step import TrainState

ITEMS = ("learner", "optimizer")
# What reading may fail of though the checkpoint is sound.
_NOT_DAMAGE = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


def _worth_telling(record: logging.LogRecord) -> bool:
    """Passes over what Orbax logs of a failure, with its traceback, many times and from threads.

    And of the next statement.
    """
    failure = record.levelno >= logging.ERROR and record.exc_info
    return not (failure or record.getMessage().startswith("Type handler registry"))


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_worth_telling)
# By default the replicas of an array save a slice each, and the first save would stop to compile
# hundreds of slices. One replica saves it all.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(use_replica_parallel=False), override=True
)


def checkpoints_folder(workdir: str | Path) -> Path:
    """The folder of a workdir's checkpoints."""
    return Path(workdir).absolute() / "checkpoints"


def saved_steps(workdir: str | Path) -> list[int]:
    """The steps of which there is a checkpoint, ascending; whether it is sound is not looked at."""
    folder = checkpoints_folder(workdir)
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(p.name) for p in paths if p.name.isdecimal() and p.is_dir())


def load_arrays(
    workdir: str | Path, step: int, items: Sequence[str] = ITEMS
) -> dict[str, np.ndarray]:
    """Returns every array saved at `step` by path, as "learner/params/encoder/…", on this host.

    Needs neither the model nor its config. Only those of `items` are read.

    Raises:
      Damaged: the checkpoint is not what was saved.
    """
    folder = checkpoints_folder(workdir) / str(step)
    manifest = read_manifest(folder)
    reader = ocp.PyTreeCheckpointHandler()

    def read(item: str) -> Any:
        path = epath.Path(folder / item)
        as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
        args = jax.tree.map(lambda _: as_numpy, reader.metadata(path).tree)
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))

    tree = _reading(folder, lambda: {item: read(item) for item in items})
    saved = {k: leaf for k, leaf in manifest["leaves"].items() if k.split("/")[0] in items}
    compare(folder, describe(tree, jax.jit(fingerprints)(tree)), saved)
    return rules.flatten(tree)


def saved_identity(workdir: str | Path, step: int) -> dict[str, str]:
    """Returns what the checkpoint of `step` is bound to: `identity` of `Checkpoints` as it saved.

    Raises:
      Damaged: the checkpoint is not what was saved.
    """
    return read_manifest(checkpoints_folder(workdir) / str(step))["identity"]


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's folder.
      config: gives what is kept.
      identity: further strings that a checkpoint is bound to, by the file they stand for; one that
        was made with others is refused.
      read_only: for evaluation and export of somebody's run.

    Raises:
      UserError: the folder cannot be made.
    """

    def __init__(
        self,
        workdir: str | Path,
        config: ConfigDict,
        *,
        identity: Mapping[str, str] | None = None,
        read_only: bool = False,
    ):
        self._workdir = Path(workdir)
        self._identity = dict(identity or {})
        self._best = config.checkpoint.best
        self._lowest = config.checkpoint.best_mode == "min"
        self._minutes = config.checkpoint.every_minutes
        self._saved_at = time.monotonic()
        self._saving = self._failed = False
        self._fingerprints = jax.jit(fingerprints)
        keep_every = config.checkpoint.keep_every_steps
        self._manager = ocp.CheckpointManager(
            checkpoints_folder(workdir),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(config.checkpoint.keep_last),
                        *([policies.EveryNSteps(keep_every)] if keep_every else []),
                        _KeepStep(self.best_step),
                    ]
                ),
                read_only=read_only,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                # Otherwise the process hangs where folders cannot be made.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    def latest_step(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return max(saved_steps(self._workdir), default=None)

    def best_step(self) -> int | None:
        """The saved step with the best `config.checkpoint.best`; None if that is not known."""
        evaluator, _, figure = self._best.rpartition("/")
        figures = {}
        for step in saved_steps(self._workdir) if self._best else ():
            path = self._workdir / "evals" / evaluator / f"{step}.json"
            if path.exists():
                figures[step] = json.loads(path.read_text(encoding="utf-8")).get(figure)
        known = {step: f if self._lowest else -f for step, f in figures.items() if f is not None}
        return min(known, key=known.get, default=None)

    def prepare(self, abstract: TrainState) -> None:
        """Compiles what `save` runs on the devices, so that no step has to wait for it."""
        self._fingerprints = self._fingerprints.lower(_items(abstract)).compile()

    def minutes_passed(self) -> bool:
        """Whether `config.checkpoint.every_minutes` have passed since the last save, here."""
        return bool(self._minutes) and time.monotonic() - self._saved_at > 60 * self._minutes

    def save(self, state: TrainState) -> None:
        """Begins to save; training may go on at once.

        Raises:
          UserError: this save, or the one before, found no room or no permission.
        """
        step, items = int(jax.device_get(state.step)), _items(state)
        self._saved_at = time.monotonic()
        leaves = describe(items, self._fingerprints(items))
        manifest = make_manifest(step, self._identity, leaves)
        # Orbax copies to the host, and with several hosts waits for all, without telling the guard.
        with self._failure_told(), jax.transfer_guard("allow"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{item: ocp.args.StandardSave(items[item]) for item in ITEMS},
                    manifest=ocp.args.JsonSave(manifest),
                ),
            )
        self._saving = True

    def check(self) -> None:
        """Raises UserError if the save under way has failed by now."""
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way; raises UserError if it fails."""
        with self._failure_told(), jax.transfer_guard("allow"):
            self._manager.wait_until_finished()
        self._saving = False

    def restore_newest(
        self, abstract: TrainState, say: Callable[[str], None] = print
    ) -> TrainState | None:
        """Returns the newest sound state, laid out as `abstract` says; None if there is none.

        Newer ones that are damaged are told through `say` and set aside as `STEP.damaged`.

        Raises:
          UserError: see `restore`; or there are checkpoints, but all are damaged.
        """
        steps = saved_steps(self._workdir)
        for step in reversed(steps):
            try:
                return self.restore(abstract, step)
            except Damaged as e:
                say(f"{e}. It is set aside as {step}.damaged.")
                self._set_aside(step)
        if steps:
            raise UserError(
                f"{self._manager.directory}: every checkpoint is damaged, from {steps[0]} to "
                f"{steps[-1]}. Put a sound one back, or use another --workdir to begin again."
            )
        return None

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """Returns the state saved at `step`, laid out as `abstract` says.

        Raises:
          Damaged: the checkpoint is not what was saved.
          UserError: it holds another model or optimizer than the config describes, was made with
            another tokenizer, or may not be read.
        """
        folder = self._manager.directory / str(step)
        manifest = read_manifest(folder)
        target = _items(abstract)
        self._check_fit(folder, manifest, target)
        read = functools.partial(
            self._manager.restore,
            step,
            args=ocp.args.Composite(
                **{item: ocp.args.StandardRestore(target[item]) for item in ITEMS}
            ),
        )
        saved = dict(_reading(folder, read).items())
        compare(folder, describe(saved, self._fingerprints(saved)), manifest["leaves"])
        return TrainState(**saved["learner"], opt_state=saved["optimizer"]["opt_state"])

    def close(self) -> None:
        """Waits for a save under way and lets go; raises UserError if that save failed."""
        with contextlib.suppress(*([Exception] if self._failed else [])):  # told already
            try:
                self.wait()
            finally:
                self._manager.close()

    def _check_fit(self, folder: Path, manifest: dict[str, Any], target: Any) -> None:
        """Raises UserError unless the checkpoint is one of this model, tokenizer and optimizer."""
        for file, found in self._identity.items():
            if manifest["identity"].get(file) != found:
                raise UserError(
                    f"{self._workdir / file}: is not the file that {folder} was trained with. "
                    "Put that one back, or use another --workdir."
                )
        saved, wanted = manifest["leaves"], describe(target)
        for path in [*wanted, *(path for path in saved if path not in wanted)]:
            there, here = (shape_of(leaves.get(path)) for leaves in (saved, wanted))
            if there != here:
                what = "optimizer" if path.startswith("optimizer/") else "model"
                raise UserError(
                    f"{folder}: holds another {what} than this config describes: {path} is {there} "
                    f"there, {here} here.\nUse another --workdir, or the config it was made with."
                )

    def _set_aside(self, step: int) -> None:
        if jax.process_index() == 0:
            folder = self._manager.directory / str(step)
            aside = folder.with_name(f"{step}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        cluster.barrier()
        self._manager.reload()

    @contextlib.contextmanager
    def _failure_told(self) -> Iterator[None]:
        """Turns what a full or forbidden disk makes of a save into a UserError."""
        try:
            yield
        except Exception as e:
            self._saving, self._failed = False, True
            reason = disk_error(e)
            if reason is None:
                raise
            left = saved_steps(self._workdir)
            on = f"it goes on from step {left[-1]}, which is intact" if left else "it begins anew"
            raise UserError(
                f"{self._manager.directory}: a checkpoint could not be saved ({reason}).\n"
                f"Mend that and run again: {on}."
            ) from e


class _KeepStep(policies.PreservationPolicy):
    """Preserves the step that `choose` returns when Orbax clears away old checkpoints."""

    def __init__(self, choose: Callable[[], int | None]):
        self._choose = choose

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._choose()
        return [checkpoint.step == kept for checkpoint in checkpoints]


def _items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint besides the manifest."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {"optimizer": {"opt_state": fields.pop("opt_state")}, "learner": fields}


def _reading(folder: Path, read: Callable[[], Any]) -> Any:
    """Returns `read()`, on every host or on none; raises Damaged if it fails of the files."""
    result, damage = None, None
    try:
        with warnings.catch_warnings():
            # Orbax leaves coroutines behind when it fails.
            warnings.simplefilter("ignore", RuntimeWarning)
            result = read()
    except Exception as e:
        if reason := disk_error(e):
            raise UserError(f"{folder}: cannot be read ({reason}).") from e
        if isinstance(e, MemoryError) or any(word in str(e) for word in _NOT_DAMAGE):
            raise
        damage = e
    told = (str(damage).strip() or repr(damage)).splitlines()[0] if damage else ""
    if reason := cluster.decided(told, lambda said: next(filter(None, said), "")):
        raise Damaged(f"{folder}: is damaged ({reason[:200]})") from damage
    return result


def _but_late_callbacks(unraisable: Any, before: Callable = sys.unraisablehook) -> None:
    """Passes over TensorStore's threads reporting to an event loop that Orbax has given up."""
    if str(unraisable.exc_value) != "Event loop is closed":
        before(unraisable)


sys.unraisablehook = _but_late_callbacks
