"""Copies on the hosts' own disks survive a kill, and are used only where they are surely right."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cap_pretrain.checkpoints import local_copies
from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.checkpoints.local_copies import RUN_ID, LocalCopies
from cap_pretrain.cli import processes
from cap_pretrain.distributed import sharding
from cap_pretrain.training.step import TrainState
from tests import toy
from tests.checkpoints.test_full_disk import file_size_limit
from tests.checkpoints.test_replicas import state as odd_state


def config(folder, **fields):
    fields = {"checkpoint__local": str(folder), "checkpoint__local_every_steps": 10} | fields
    return toy.config(**fields)


def state(step: int) -> TrainState:
    mesh = sharding.make_mesh(toy.config())
    found = odd_state().replace(step=np.int32(step))
    small = {name: leaf for name, leaf in found.opt_state.items() if name in ("half", "small")}
    found = found.replace(params=found.stats, opt_state=small)
    return jax.device_put(found, NamedSharding(mesh, P()))


def abstract():
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
    )


class Start:
    """A start of a run with copies in `folder/local`; `said` are the lines that it prints."""

    def __init__(self, folder, **fields):
        c = config(folder / "local", **fields)
        workdir = folder / "run"
        workdir.mkdir(exist_ok=True)
        self.said: list[str] = []
        self.checkpoints = Checkpoints(workdir, c)
        mesh = sharding.make_mesh(c)
        self.copies = LocalCopies(workdir, c, mesh, self.checkpoints, self.said.append)

    def save(self, *steps):
        for step in steps:
            self.copies.save(state(step))
            self.copies.close()
        return self

    def restore(self):
        found = self.copies.restore(abstract())
        self.checkpoints.close()
        return found


def copies_in(folder):
    return sorted(path.name for path in folder.glob("local/*/*"))


def test_the_newest_two_are_kept_and_the_newest_comes_back_bit_by_bit(tmp_path):
    start = Start(tmp_path).save(10, 20, 30)
    assert [start.copies.due(step) for step in (9, 10, 20)] == [False, True, True]
    assert copies_in(tmp_path) == ["20.copy", "30.copy"]
    again = Start(tmp_path)
    toy.assert_same(again.restore(), state(30))
    assert len(again.said) == 1 and "Step 30 is restored from local copies" in again.said[0]
    again.copies.remove()
    assert copies_in(tmp_path) == []
    last = Start(tmp_path)
    assert last.restore() is None and last.said == []


def damage(path, at=-1):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def save_checkpoint(folder, step):
    checkpoints = Checkpoints(folder / "run", config(folder / "local"))
    checkpoints.save(state(step))
    checkpoints.close()


CASES = {
    "a bit": (lambda folder, copy: damage(copy), "differs from what was saved"),
    "the header": (lambda folder, copy: damage(copy, 5), "they are of another run"),
    "cut": (lambda folder, copy: os.truncate(copy, 1000), "is not complete|another run"),
    "another run": (lambda folder, copy: (folder / "run" / RUN_ID).unlink(), "another run"),
    "a newer checkpoint": (
        lambda folder, copy: save_checkpoint(folder, 40),
        "the checkpoint of step 40 is newer",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_copies_that_are_not_right_are_left_with_one_line(case, tmp_path):
    Start(tmp_path).save(30)
    (copy,) = tmp_path.glob("local/*/*")
    spoil, line = CASES[case]
    spoil(tmp_path, copy)
    start = Start(tmp_path)
    assert start.restore() is None
    assert len(start.said) == 1 and "are not used: " in start.said[0], start.said
    assert re.search(line, start.said[0]), start.said


def test_copies_of_another_config_or_of_a_checkpoint_that_was_removed_are_left(tmp_path):
    save_checkpoint(tmp_path, 20)
    Start(tmp_path).save(30)
    other = Start(tmp_path, optim__lr=0.5)
    assert other.restore() is None and "another run, config or mesh" in other.said[0]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    start = Start(tmp_path)
    assert start.restore() is None and "checkpoint of step 20 was removed" in start.said[0]


def test_a_full_disk_costs_a_line_and_leaves_the_copies_before(tmp_path):
    start = Start(tmp_path).save(10)
    with file_size_limit(1000):
        start.save(20, 30)
    start.save(40)
    assert copies_in(tmp_path) == ["10.copy", "40.copy"]
    assert len(start.said) == 1
    assert "cannot be written (host 0: " in start.said[0] and "File too large" in start.said[0]
    start.checkpoints.close()


def test_a_folder_of_others_is_not_used(tmp_path):
    start = Start(tmp_path).save(10)
    (folder,) = tmp_path.glob("local/*")
    folder.chmod(0o777)
    start.save(20, 30)
    assert "another user owns it" in start.said[0]
    assert start.restore() is None


def test_copies_of_hosts_that_had_another_number_are_removed(tmp_path):
    Start(tmp_path).save(10)
    (folder,) = tmp_path.glob("local/*")
    shutil.copytree(folder, folder.with_name(f"{folder.name[:-1]}3"))
    other = folder.with_name("0123456789abcdef-0")
    other.mkdir()
    Start(tmp_path).save(20)
    assert {*tmp_path.glob("local/*")} == {folder, other}
    assert copies_in(tmp_path) == ["10.copy", "20.copy"]
    Start(tmp_path, checkpoint__local_every_steps=0).copies.remove()
    assert {*tmp_path.glob("local/*")} == {other}


def test_only_one_copy_is_there_while_another_is_written(tmp_path, monkeypatch):
    start, seen = Start(tmp_path).save(10, 20), []
    usage = shutil.disk_usage(tmp_path)

    def full(_):
        seen.extend(copies_in(tmp_path))
        return usage._replace(free=100_000)

    monkeypatch.setattr(shutil, "disk_usage", full)
    start.save(30, 40)
    assert seen[0] == "20.copy" and "may be used" in start.said[0]
    start.checkpoints.close()


def test_an_outage_costs_a_copy_and_a_busy_host_does_not_flush(tmp_path):
    def flush():
        raise OSError(errno.EIO, "Service Unavailable", "gs://bucket/run/metrics.jsonl")

    start = Start(tmp_path)
    start.copies.save(state(10), flush)
    assert copies_in(tmp_path) == [] and "gs://bucket/run/metrics.jsonl: Serv" in start.said[0]
    start.copies._writing = busy = threading.Thread(target=time.sleep, args=(0.1,))
    busy.start()
    start.copies.save(state(20), flush)
    assert copies_in(tmp_path) == [] and len(start.said) == 1
    start.checkpoints.close()


def test_the_default_folder_belongs_to_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(local_copies, "_root", lambda: tmp_path / "shm")
    start = Start(tmp_path, checkpoint__local="").save(10)
    assert (tmp_path / "shm").stat().st_mode & 0o777 == 0o700
    (tmp_path / "shm").chmod(0o777)
    start.save(20, 30)
    assert "another user owns it" in start.said[0]
    assert start.restore() is None


HOSTS = 2
COMPILED_EARLIER = "Persistent compilation cache hit for 'jit_train_step'"
SENT = "Compiling jit(send)"  # of checkpoints/replicas.py
CONFIG = """
from tests import quick, toy

def get_config():
    steps = {"total_steps": 60, "checkpoint__every_steps": 30, "checkpoint__local_every_steps": 4}
    more = {"eval__every_share": 0.0, "mesh__fsdp": 2, "checkpoint__local": LOCAL}
    return toy.config(quick.NAME, {}, optim__ema=0.9, log__ids=True, **steps, **more)
"""


def begin(workdir):
    """Start the program on two hosts with two devices each."""
    config = workdir.with_name("config.py")
    config.write_text(CONFIG.replace("LOCAL", repr(str(workdir.with_name("local")))))
    command = [sys.executable, "-m", "cap_pretrain.main", f"--config={config}"]
    command.append(f"--workdir={workdir}")
    address = processes._free_address()
    cache = {"JAX_COMPILATION_CACHE_DIR": str(workdir.with_name("compiled"))}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_LOG_COMPILES": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [
        subprocess.Popen(
            command, env=processes.environment(address, HOSTS, host, 2) | cache, **pipes
        )
        for host in range(HOSTS)
    ]


def finished(running):
    printed = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * HOSTS, "\n".join(printed)
    return printed[0]


def figures(workdir):
    return {
        (line["step"], name): value
        for line in toy.lines(workdir)
        for name, value in line.items()
        if name.startswith(("train/", "data/"))
    }


@pytest.mark.slow
def test_two_killed_hosts_resume_from_their_copies_and_else_from_the_checkpoint(tmp_path):
    workdir, local = tmp_path / "run", tmp_path / "local"

    def copied():
        found = [{int(p.stem) for p in local.glob(f"*-{host}/*.copy")} for host in range(HOSTS)]
        return max(set.intersection(*found), default=0)

    running = begin(workdir)
    deadline = time.monotonic() + 120
    while copied() < 34 and time.monotonic() < deadline:
        time.sleep(0.005)
    for process in running:
        process.send_signal(signal.SIGKILL)
    printed = [process.communicate()[0] for process in running]
    step = copied()
    assert 34 <= step < 60, printed
    for folder in (workdir, local):
        shutil.copytree(folder, folder.with_name(f"{folder.name} before"))

    from_copies = finished(begin(workdir))
    assert f"Step {step} is restored from local copies" in from_copies
    assert f"Resuming from step {step}." in from_copies
    assert COMPILED_EARLIER in from_copies
    assert not list(local.glob("*"))  # superfluous at the end
    found = figures(workdir)
    assert {step for step, _ in found} == set(range(1, 61))

    for folder in (workdir, local):
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name(f"{folder.name} before"), folder)
    (lost,) = local.glob("*-1")
    shutil.rmtree(lost)
    from_checkpoint = finished(begin(workdir))
    assert f"are not used: host 1 has none of step {step}" in from_checkpoint
    assert "Resuming from step 30." in from_checkpoint
    assert COMPILED_EARLIER in from_checkpoint and SENT in from_checkpoint
    assert figures(workdir) == found  # bit by bit
