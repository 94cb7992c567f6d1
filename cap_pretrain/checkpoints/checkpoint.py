"""Saving and restoring the training state with Orbax, in `WORKDIR/checkpoints/STEP/`.

A checkpoint has three items: `learner` (what evaluation and export read), `optimizer`, and
`manifest`, the path, shape, dtype and fingerprint of every array in the other two. Restored arrays
are compared with it, which detects any corruption and tells it from a checkpoint of another model.
An interrupted save leaves older ones intact; `folders` says when a checkpoint counts.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from cap_pretrain import files, untrusted
from cap_pretrain.checkpoints import regrid
from cap_pretrain.checkpoints.folders import (
    checkpoints_folder,
    remove_unfinished,
    saved_steps,
    set_aside,
)
from cap_pretrain.checkpoints.manifest import (
    CorruptCheckpointError,
    compare,
    describe,
    format_leaf,
    make_manifest,
    read_manifest,
)
from cap_pretrain.checkpoints.orbax_setup import configure_orbax
from cap_pretrain.checkpoints.reading import out_of_reach, read_on_all_hosts
from cap_pretrain.checkpoints.stored import ITEMS
from cap_pretrain.distributed import cluster
from cap_pretrain.distributed.ahead import Ahead
from cap_pretrain.errors import UserError, disk_error
from cap_pretrain.fingerprint import fingerprints
from cap_pretrain.optim.schedule import BatchSizes
from cap_pretrain.training.step import TrainState


class Checkpoints:
    """The checkpoints of one workdir, kept as `config.checkpoint` says.

    `identity` maps files to a string that identifies their content, such as a hash. It is saved
    with each checkpoint, and one saved with another identity is refused. `batches` are the batch
    sizes of the run, saved too; by default that of the config. `read_only` leaves the folder
    unchanged, for evaluation and export. Symbolic links to checkpoints are read and never removed.

    Raises UserError if a folder that is not `read_only` cannot be created, or holds something else
    under the name of a checkpoint.
    """

    def __init__(
        self,
        workdir: str | Path,
        config: ConfigDict,
        *,
        identity: Mapping[str, str] | None = None,
        batches: BatchSizes | None = None,
        read_only: bool = False,
    ):
        configure_orbax()
        self._workdir = files.place(workdir)
        self._identity = dict(identity or {})
        self._batches = (batches or BatchSizes(((0, config.batch_size),))).sizes
        self._best = config.checkpoint.best
        self._lowest = config.checkpoint.best_mode == "min"
        self._minutes = config.checkpoint.every_minutes
        self._saved_at = time.monotonic()
        self._saving = self._failed = False
        self._known: int | None = None  # the newest step, where no listing is needed to know it
        self._fingerprints: Callable[[Any], Any] = jax.jit(fingerprints)
        keep_every = config.checkpoint.keep_every_steps
        if not read_only:
            for path in files.numbered(checkpoints_folder(workdir)).values():
                if not path.is_dir():
                    what = "a link to nothing" if path.is_symlink() else "a file"
                    raise UserError(f"{path}: is {what} instead of a checkpoint; remove it.")
            cluster.decided(None, lambda _: remove_unfinished(self._workdir))
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
                step_name_format=_OwnSteps(),
                read_only=read_only,
                create=not read_only,
                # In a bucket it would remove what was set aside, too.
                cleanup_tmp_directories=not (read_only or files.is_url(self._workdir)),
                # With asynchronous creation the process hangs where folders cannot be created.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            ),
        )

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return max(saved_steps(self._workdir), default=None)

    def known_step(self) -> int:
        """Return what `latest_step` was after the last save or set aside, 0 if there was none.

        Lists the folder only then.
        """
        if self._known is None:
            self._known = self.latest_step() or 0
        return self._known

    def best_step(self) -> int | None:
        """Return the saved step with the best `config.checkpoint.best`, or None if unknown."""
        evaluator, _, metric = self._best.partition("/")
        values = {}
        for step in saved_steps(self._workdir) if self._best else ():
            path = self._workdir / "evals" / evaluator / f"{step}.json"
            if path.exists():
                values[step] = untrusted.checked(files.read_json(path), "result", dict, path)
        found = {step: result.get(metric) for step, result in values.items()}
        known = {
            step: value if self._lowest else -value
            for step, value in found.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        return min(known, key=known.__getitem__, default=None)

    def prepare(self, abstract: TrainState, *, background: bool = False) -> None:
        """Compile the fingerprints of a state ahead of time, so that no step waits for them."""
        program, items = jax.jit(fingerprints), items_of(abstract)
        self._fingerprints = Ahead(program, items) if background else program.lower(items).compile()

    def minutes_passed(self) -> bool:
        """Return whether `checkpoint.every_minutes` (0: never) passed since the last save here."""
        return bool(self._minutes) and time.monotonic() - self._saved_at > 60 * self._minutes

    def manifest(self, state: TrainState) -> dict[str, Any]:
        """Return what is saved with `state`, from which `verify` sees whether it is intact."""
        step, items = int(jax.device_get(state.step)), items_of(state)
        leaves = describe(items, self._fingerprints(items))
        return make_manifest(step, self._identity, leaves, self._batches)

    def verify(self, where: Path, items: Any, manifest: Mapping[str, Any]) -> None:
        """Raise CorruptCheckpointError unless the items read from `where` fit the manifest."""
        compare(where, describe(items, self._fingerprints(items)), manifest["leaves"])

    def save(self, state: TrainState, flush: Callable[[], object] = lambda: None) -> None:
        """Start saving `state` in the background, and let training continue.

        `flush` stores what was logged up to the state. Raises UserError if this save or the
        previous one lacked disk space or permission.
        """
        flush()
        manifest, items = self.manifest(state), items_of(state)
        self._saved_at = time.monotonic()
        # Orbax copies to the host, and synchronizes several hosts, by implicit transfers.
        with self._disk_errors_as_user_errors(), jax.transfer_guard("allow"):
            self._manager.save(
                manifest["step"],
                args=ocp.args.Composite(
                    **{item: ocp.args.StandardSave(items[item]) for item in ITEMS},
                    manifest=ocp.args.JsonSave(manifest),
                ),
            )
        self._saving = True

    def check(self) -> None:
        """Raise UserError if a background save has failed by now; does not wait."""
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for the background save, if any; raise UserError if it failed."""
        with self._disk_errors_as_user_errors(), jax.transfer_guard("allow"):
            self._manager.wait_until_finished()
        if self._saving:
            self._saving, self._known = False, None

    def restore_newest(
        self, abstract: TrainState, say: Callable[[str], None] = print
    ) -> TrainState | None:
        """Restore the newest valid checkpoint as `restore` does; return None if there are none.

        Newer, corrupt checkpoints are reported through `say` and set aside, see `folders`; if all
        are corrupt, UserError is raised.
        """
        steps = saved_steps(self._workdir)
        for step in reversed(steps):
            try:
                return self.restore(abstract, step, say)
            except CorruptCheckpointError as e:
                say(f"{e}. {self._set_aside(step, str(e))}.")
        if steps:
            raise UserError(
                f"{self._manager.directory}: every checkpoint is corrupt, from {steps[0]} to "
                f"{steps[-1]}. Put a valid one back, or use another --workdir to start over."
            )
        return None

    def restore(
        self, abstract: TrainState, step: int, say: Callable[[str], None] = print
    ) -> TrainState:
        """Restore the state saved at `step`, with the shapes, dtypes and shardings of `abstract`.

        Position embeddings for images of another size are resampled, see `regrid`.

        Raises:
            CorruptCheckpointError: an array or the manifest differs from what was saved.
            UserError: it is of another model, optimizer or tokenizer, or the disk does not permit
                reading.
        """
        folder = self._manager.directory / str(step)
        manifest = read_on_all_hosts(folder, functools.partial(read_manifest, folder))
        wanted = target = items_of(abstract)
        resized = regrid.grids(manifest["leaves"], describe(wanted))
        if resized:
            target = regrid.as_saved(wanted, manifest["leaves"])
        self._check_compatible(folder, manifest, target)
        read = functools.partial(
            self._manager.restore,
            step,
            args=ocp.args.Composite(
                **{item: ocp.args.StandardRestore(target[item]) for item in ITEMS}
            ),
        )
        saved = dict(read_on_all_hosts(folder, read).items())
        if resized:
            compare(folder, describe(saved, jax.jit(fingerprints)(saved)), manifest["leaves"])
            saved = regrid.resampled(saved, wanted, resized)
            say(resized.describe())
        else:
            self.verify(folder, saved, manifest)
        return state_of(saved)

    def close(self) -> None:
        """Wait for the background save and release Orbax; raise UserError if that save failed."""
        # A failure that was already raised is not raised again.
        with contextlib.suppress(*([Exception] if self._failed else [])):
            try:
                self.wait()
            finally:
                self._manager.close()

    def _check_compatible(self, folder: Path, manifest: dict[str, Any], target: Any) -> None:
        """Raise UserError unless the checkpoint is of this model, optimizer and tokenizer."""
        for file, identity in self._identity.items():
            if manifest["identity"].get(file) != identity:
                raise UserError(
                    f"{self._workdir / file}: is not the file that {folder} was trained with. "
                    "Put that one back, or use another --workdir."
                )
        saved, wanted = manifest["leaves"], describe(target)
        for path in [*wanted, *(path for path in saved if path not in wanted)]:
            there, here = (format_leaf(leaves.get(path)) for leaves in (saved, wanted))
            if there != here:
                what = "optimizer" if path.startswith("optimizer/") else "model"
                raise UserError(
                    f"{folder}: holds another {what} than this config describes: {path} is {there} "
                    f"there, {here} here.\nUse another --workdir, or the config it was made with."
                )

    def _set_aside(self, step: int, why: str) -> str:
        """Set the checkpoint of `step` aside, for all hosts; return what was done."""
        done = cluster.decided(None, lambda _: set_aside(self._workdir, step, why))
        self._manager.reload()
        self._known = None
        return done

    @contextlib.contextmanager
    def _disk_errors_as_user_errors(self) -> Iterator[None]:
        """Turn failures of a save caused by a full or read-only disk into UserError.

        Those caused by a bucket out of reach become OSError.
        """
        try:
            yield
        except Exception as e:
            self._saving, self._failed = False, True
            reason = disk_error(e)
            if reason is None:
                if passing := out_of_reach(e, self._manager.directory):
                    raise passing from e
                raise
            left = saved_steps(self._workdir)
            resumes = f"resumes from step {left[-1]}, which is intact" if left else "starts over"
            raise UserError(
                f"{self._manager.directory}: a checkpoint could not be saved ({reason}).\n"
                f"Fix that and run the same command again: the run {resumes}."
            ) from e


class _OwnSteps(ocp.path.step.NameFormat):
    """The names of the checkpoints that Orbax manages and may delete: numbers, and no links."""

    _standard = ocp.path.step.standard_name_format()

    def build_name(self, step: int) -> str:
        """Return the name of a step's folder."""
        return str(step)

    def find_all(self, base_path: Any) -> Iterator[Any]:
        """Yield Orbax's metadata of every checkpoint."""
        if files.is_url(base_path):
            steps = saved_steps(files.place(base_path).parent)
            return (self._metadata(base_path, step) for step in steps)
        own = {
            str(step)
            for step, path in files.numbered(files.place(base_path)).items()
            if not path.is_symlink()
        }
        return (found for found in self._standard.find_all(base_path) if found.path.name in own)

    def find_step(self, base_path: Any, step: int) -> Any:
        """Return Orbax's metadata of a checkpoint, which may be a link."""
        if files.is_url(base_path) and step in saved_steps(files.place(base_path).parent):
            return self._metadata(base_path, step)
        return self._standard.find_step(base_path, step)

    def _metadata(self, base_path: Any, step: int) -> Any:
        """Return Orbax's metadata of a checkpoint in a bucket, without asking about its parts."""
        return ocp.path.step.Metadata(step=step, path=files.place(base_path) / str(step))


class _KeepStep(policies.PreservationPolicy):
    """An Orbax policy that preserves the step returned by `choose` at each cleanup."""

    def __init__(self, choose: Callable[[], int | None]):
        self._choose = choose

    def should_preserve(self, checkpoints: Sequence[Any], **_: Any) -> list[bool]:
        """Return for each checkpoint whether to keep it."""
        kept = self._choose()
        return [checkpoint.step == kept for checkpoint in checkpoints]


def items_of(state: TrainState) -> dict[str, Any]:
    """Return the items of a checkpoint, other than the manifest."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {"optimizer": {"opt_state": fields.pop("opt_state")}, "learner": fields}


def state_of(items: Any) -> TrainState:
    """Invert `items_of`."""
    return TrainState(**items["learner"], opt_state=items["optimizer"]["opt_state"])
