"""One run at a time in a workdir."""

import errno
import fcntl
import os
import random
import re
import signal
import socket
import subprocess
import sys

import pytest

from cap_pretrain import train
from cap_pretrain.errors import UserError
from cap_pretrain.training import lock
from tests import toy

HOLD = """
import sys, time
from pathlib import Path
from cap_pretrain.training.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_run_is_told_who_holds_the_workdir(tmp_path, tokenizer_path):
    config = toy.config(text__tokenizer=str(tokenizer_path))
    with lock.locked(tmp_path), pytest.raises(UserError) as error:
        train.run(config, tmp_path)
    host = re.escape(repr(socket.gethostname()))
    who = rf"in use by process {os.getpid()} on host {host} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.search(who, str(error.value)) and len(str(error.value).splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == [lock.LOCK_FILE]  # nothing was written
    with lock.locked(tmp_path):  # the first has ended, and its file is still there
        pass


def test_a_killed_run_keeps_nobody_out(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=toy.CONFIGS.parent)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid} "), lock.locked(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.locked(tmp_path):
        assert f'"process": {os.getpid()}' in (tmp_path / lock.LOCK_FILE).read_text()


def test_whatever_the_file_contains_the_message_is_short(tmp_path):
    rng = random.Random(0)
    path = tmp_path / lock.LOCK_FILE
    fixed = [b"", b"[" * 9999, b'{"host": 1}', b'{"host": "a", "since": "b", "process": "c"}']
    for content in [*fixed, *(rng.randbytes(rng.randrange(99)) for _ in range(200))]:
        path.write_bytes(content)
        with path.open() as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with pytest.raises(UserError, match="in use by another process"), lock.locked(tmp_path):
                pass


def test_no_link_is_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    workdir = tmp_path / "run"
    for make in (lambda p: p.symlink_to(precious), os.mkfifo, os.mkdir):
        workdir.mkdir()
        make(workdir / lock.LOCK_FILE)
        match = r"run.lock: is not a regular file"
        with pytest.raises(UserError, match=match), lock.locked(workdir):
            pass
        workdir.rename(tmp_path / f"done_{len(list(tmp_path.iterdir()))}")
    assert precious.read_text() == "kept"


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with lock.locked(tmp_path, said.append):
        assert len(said) == 1 and "has no locks" in said[0]
