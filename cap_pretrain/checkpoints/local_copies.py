"""Copies of the newest state on each host's own disk or in its memory, for preemptions.

Every `checkpoint.local_every_steps` steps each host writes the parts of the state that its devices
hold to a local file, in the background. A restart uses the copies if every host has that of the
same step, made by the same run on the same mesh, and no checkpoint is as new. Copies never replace
checkpoints: whatever is wrong with them costs a line.

Orbax has emergency checkpoints for this (`orbax.checkpoint.experimental.emergency`), which were
tried against its source, 0.12.8. They keep local copies of all data replicas but the first, so need
two, and hosts of one replica each: one replica over fsdp, or four GPUs of a host that hold a
replica each, are refused. Restoring adds floats to zeros, which turns -0.0 into 0.0. They replace
the manager of checkpoints, whose state is one item, so manifests, links and the best checkpoint
would have to go; and hosts that are two minutes apart fail.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import files, inputs, rules
from cap_pretrain.checkpoints.checkpoint import Checkpoints, items_of, state_of
from cap_pretrain.checkpoints.manifest import CorruptCheckpointError
from cap_pretrain.distributed import cluster
from cap_pretrain.errors import disk_error
from cap_pretrain.training.changes import binding
from cap_pretrain.training.step import TrainState

RUN_ID = "run_id"
"""The file in a workdir with a random name of the run, which its copies bear.

A workdir that was removed and made anew has another one.
"""

_ENDING = ".copy"
_MAX_HEADER = 2**28  # bytes; a header has about 200 an array
_SHARE = 0.9  # of the space that is free; in memory, other programs need the rest

Bounds = tuple[tuple[int, int], ...]  # the start and stop of a part along each dimension


class LocalCopies:
    """The copies of this host. All hosts make them together, and all must call each method.

    Args:
        workdir: the folder of the run.
        config: its config.
        mesh: the mesh of the state.
        checkpoints: the checkpoints of the run.
        say: receives a line where copies cannot be written or used.
    """

    def __init__(
        self,
        workdir: Path,
        config: ConfigDict,
        mesh: Mesh,
        checkpoints: Checkpoints,
        say: Callable[[str], None],
    ):
        self._every = config.checkpoint.local_every_steps if configs.trains(config) else 0
        self._workdir, self._checkpoints, self._say = workdir, checkpoints, say
        self._writing: threading.Thread | None = None
        self._failure, self._said = "", False
        self._trains, self._alone = configs.trains(config), False
        self._default = not config.checkpoint.local
        self._folder = _folder(config.checkpoint.local, workdir)
        if self._every:
            self._identity = _identity(workdir, config, mesh)

    def due(self, step: int) -> bool:
        """Return whether a copy is due after a step."""
        return bool(self._every) and step % self._every == 0

    def save(self, state: TrainState, flush: Callable[[], object] = lambda: None) -> None:
        """Copy `state` to the host's memory and write it in the background.

        Does nothing while a host still writes the copy before, and only prints a line if a bucket
        is out of reach. `flush` stores what was logged up to the state. Raises OSError if the disk
        does not permit that.
        """
        busy = self._writing is not None and self._writing.is_alive()
        newest, last, problem = max(self._found()[0], default=-1), 0, ""
        try:
            if not busy:
                flush()
                last = 0 if jax.process_index() else self._checkpoints.known_step()
        except OSError as e:
            if disk_error(e):
                raise
            problem = f"{e.filename}: {e.strerror}"

        def decide(hosts: list[list[Any]]) -> list[Any]:
            busy, newest, *texts = zip(*hosts, strict=True)
            found = ([f"host {n}: {each}" for n, each in enumerate(t) if each] for t in texts)
            return [any(busy), min(newest), *(next(iter(lines), "") for lines in found), last]

        mine = [busy, newest, self._failure, problem]
        wait, kept, failure, problem, last = cluster.decided(mine, decide)
        if failure and not self._said:
            self._say(f"Local copies cannot be written ({failure}); training continues.")
            self._said = True
        if problem:
            self._say(f"A local copy is skipped ({problem}); training continues.")
        if wait or problem:
            return
        if not self._alone:
            self._remove_unused()
            self._alone = True
        manifest = self._checkpoints.manifest(state)
        parts = _on_host(items_of(state))
        header = {"identity": self._identity, "after": last, "manifest": manifest}
        header["parts"] = [[path, bounds, data.nbytes] for path, bounds, data in parts]
        self._failure = ""
        arrays = [data for *_, data in parts]
        args = (manifest["step"], header, arrays, kept)
        self._writing = threading.Thread(target=self._write, args=args, name="local copy")
        self._writing.start()

    def restore(self, abstract: TrainState) -> TrainState | None:
        """Restore the newest copy that all hosts have; None if there is none to use.

        The state has the shapes, dtypes and shardings of `abstract`.
        """
        if not self._every:
            return None
        found, others = self._found()
        newest = self._checkpoints.latest_step() or 0

        def decide(hosts: list[list[Any]]) -> list[Any]:
            steps = [{int(step): after for step, after in mine.items()} for mine, _ in hosts]
            common = sorted(set.intersection(*map(set, steps)))
            if common and common[-1] > newest and steps[0][common[-1]] <= newest:
                return [common[-1], ""]
            return [None, _why_not(steps, any(other for _, other in hosts), common, newest)]

        step, line = cluster.decided([found, others], decide)
        if line:
            self._say(f"The local copies in {self._folder} are not used: {line}.")
        if step is None:
            return None
        manifest: Mapping[str, Any] = {}
        items, problem = None, ""
        try:
            manifest, items = self._read(step, items_of(abstract))
        except (OSError, ValueError, KeyError, TypeError) as e:
            problem = str(e).splitlines()[0] if str(e) else repr(e)
        problem = cluster.decided(problem, lambda hosts: next(filter(None, hosts), ""))
        if not problem:
            try:
                self._checkpoints.verify(self._folder / f"{step}{_ENDING}", items, manifest)
            except CorruptCheckpointError as e:
                problem = str(e)
            problem = cluster.decided(problem, lambda hosts: next(filter(None, hosts), ""))
        if problem:
            self._say(f"The local copies in {self._folder} are not used: {problem}.")
            return None
        self._say(
            f"Step {step} is restored from local copies in {self._folder}; "
            + (f"the newest checkpoint is of step {newest}." if newest else "no checkpoint exists.")
        )
        return state_of(items)

    def close(self) -> None:
        """Wait until the copy that is being written is complete."""
        if self._writing:
            self._writing.join()

    def remove(self) -> None:
        """Remove the copies of this host, which a checkpoint has made superfluous."""
        self.close()
        if self._trains:
            # Also those of hosts that had another number, and of a run that made copies before.
            for folder in self._siblings():
                shutil.rmtree(folder, ignore_errors=True)

    def _remove_unused(self) -> None:
        """Remove copies of hosts that had another number before, as after a restart.

        Hosts may share the folder of all copies, so each marks what it uses.
        """
        mark = self._folder / cluster.decided(None, lambda _: uuid.uuid4().hex)
        with contextlib.suppress(OSError):  # `_write` says so
            self._make_folder()
            mark.touch()
        cluster.barrier()
        for folder in self._siblings():
            if not (folder / mark.name).exists():
                shutil.rmtree(folder, ignore_errors=True)
        cluster.barrier()
        with contextlib.suppress(OSError):
            mark.unlink()

    def _siblings(self) -> list[Path]:
        """Return the folders of copies of this run, which are the user's own."""
        pattern = f"{self._folder.name.rpartition('-')[0]}-*"
        found = []
        with contextlib.suppress(OSError):
            found = [path for path in self._folder.parent.glob(pattern) if self._is_ours(path)]
        return found

    def _is_ours(self, folder: Path) -> bool:
        """Return whether only this user may write to a folder and, by default, the one it is in."""
        return _is_ours(folder) and (not self._default or _is_ours(folder.parent))

    def _numbered(self) -> dict[int, Path]:
        """Return the copies of this host by step; none unless the folder is the user's own."""
        try:
            return files.numbered(self._folder, _ENDING) if self._is_ours(self._folder) else {}
        except OSError:
            return {}

    def _make_folder(self) -> None:
        """Create the folder of this host's copies; raise OSError if others may write to it."""
        mode = 0o700 if self._default else 0o777
        self._folder.parent.mkdir(mode=mode, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if not self._is_ours(self._folder):
            raise OSError(None, "another user owns it or may write to it")

    def _found(self) -> tuple[dict[int, int], bool]:
        """Return what copies of this run there are, and whether there are others.

        The first is a dict from step to the newest checkpoint when the copy was made.
        """
        found, others = {}, False
        for step, path in self._numbered().items():
            try:
                header, _ = _read_header(path)
                if header["identity"] == self._identity:
                    found[step] = int(header["after"])
                    continue
            except (OSError, ValueError, KeyError, TypeError):
                pass
            others = True
        return found, others

    def _write(self, step: int, header: Any, arrays: Sequence[np.ndarray], kept: int) -> None:
        """Write a copy, after removing all but that of step `kept`, which all hosts have."""
        path = self._folder / f"{step}{_ENDING}"
        fresh = path.with_suffix(".tmp")
        try:
            self._make_folder()
            for unfinished in self._folder.glob("*.tmp"):  # of a process that was killed
                unfinished.unlink()
            for other, old in self._numbered().items():
                if other != kept:
                    old.unlink()
            needed, free = sum(a.nbytes for a in arrays), shutil.disk_usage(self._folder).free
            if needed > _SHARE * free:
                raise OSError(
                    None, f"{needed:,} bytes are needed, {int(_SHARE * free):,} may be used"
                )
            with fresh.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                for array in arrays:
                    file.write(array.reshape(-1).view(np.uint8).data)
            fresh.replace(path)
        except OSError as e:
            self._failure = f"{self._folder}: {e.strerror}"
            with contextlib.suppress(OSError):
                fresh.unlink()

    def _read(self, step: int, abstract: Any) -> tuple[Any, Any]:
        """Return manifest and items of a copy; raise OSError or ValueError if that fails."""
        path = self._folder / f"{step}{_ENDING}"
        header, start = _read_header(path)
        places: dict[tuple[str, Bounds], tuple[int, int]] = {}
        for name, bounds, size in header["parts"]:
            places[name, tuple(map(tuple, bounds))] = (start, size)
            start += size
        if path.stat().st_size != start:
            raise ValueError(f"{path.name} is not complete")
        with path.open("rb") as file:

            def read(key_path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
                shape = leaf.sharding.shard_shape(leaf.shape)
                buffers = []
                for bounds, devices in _parts(leaf).items():
                    where = places.get((rules.path_string(key_path), bounds))
                    data = np.empty(shape, leaf.dtype)
                    if where is None or where[1] != data.nbytes:
                        raise ValueError(f"{path.name} is of another mesh or model")
                    file.seek(where[0])
                    file.readinto(data.reshape(-1).view(np.uint8).data)
                    buffers += [jax.device_put(data, device) for device in devices]
                return jax.make_array_from_single_device_arrays(
                    leaf.shape, leaf.sharding, buffers, dtype=leaf.dtype
                )

            return header["manifest"], jax.tree_util.tree_map_with_path(read, abstract)


def _parts(leaf: Any) -> dict[Bounds, list[jax.Device]]:
    """Return the distinct parts of an array that devices of this host hold, and which do."""
    found: dict[Bounds, list[jax.Device]] = {}
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
        found.setdefault(bounds, []).append(device)
    return found


def _on_host(items: Any) -> list[tuple[str, Bounds, np.ndarray]]:
    """Return a copy in the host's memory of each part that it holds."""
    pending = []
    # Transfers of all parts start before the first is waited for.
    with jax.transfer_guard("allow"):
        for path, leaf in rules.flatten(items).items():
            held = {shard.device: shard.data for shard in leaf.addressable_shards}
            for bounds, (device, *_) in _parts(leaf).items():
                held[device].copy_to_host_async()
                pending.append((path, bounds, held[device]))
        found = [(path, bounds, np.asarray(data)) for path, bounds, data in pending]
    if jax.default_backend() == "cpu":  # the device's own memory, which the next step reuses
        found = [(path, bounds, data.copy()) for path, bounds, data in found]
    return [(path, bounds, np.ascontiguousarray(data)) for path, bounds, data in found]


def _why_not(
    steps: Sequence[Mapping[int, int]], others: bool, common: Sequence[int], newest: int
) -> str:
    """Return why no copies are used; "" if there are none at all."""
    if common:
        if common[-1] > newest:
            return f"the checkpoint of step {steps[0][common[-1]]} was removed since"
        return (
            f"the checkpoint of step {newest} is as new"
            if common[-1] == newest
            else (f"the checkpoint of step {newest} is newer")
        )
    if any(steps):
        step = max(max(each, default=0) for each in steps)
        host = next(n for n, each in enumerate(steps) if step not in each)
        return f"host {host} has none of step {step}"
    return "they are of another run, config or mesh" if others else ""


def _is_ours(folder: Path) -> bool:
    """Return whether it is a folder, not a link, that only this user may write to."""
    status = os.lstat(folder)
    closed = not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and closed


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a copy and where it ends; raise OSError or ValueError."""
    with path.open("rb") as file:
        line = file.readline(_MAX_HEADER)
    return json.loads(line), len(line)


def _folder(setting: str, workdir: Path) -> Path:
    """Return the folder of this host's copies: for each workdir and process one."""
    root = Path(setting).expanduser() if setting else _root()
    name = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
    return root / f"{name}-{jax.process_index()}"


def _root() -> Path:
    """Return the default folder: in memory, /dev/shm, or else in that for temporary files."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    return (memory if usable else Path(tempfile.gettempdir())) / f"cap_pretrain-{os.geteuid()}"


def _identity(workdir: Path, config: ConfigDict, mesh: Mesh) -> str:
    """Return a hash of the run, of what its state depends on, and of where devices are."""
    path = workdir / RUN_ID

    def name(_: list[None]) -> str:
        if not path.is_file():
            files.write_text(path, uuid.uuid4().hex + "\n")
        return path.read_text()

    about = {
        "run": cluster.decided(None, name),
        "workdir": str(workdir.absolute()),
        "config": binding(config),
        "tokenizer": inputs.tokenizer_identity(workdir),
        "mesh": dict(mesh.shape),
        "hosts": [device.process_index for device in mesh.devices.flat],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
