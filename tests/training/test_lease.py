"""One run at a time in a workdir that is in a bucket."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from cap_pretrain import files
from cap_pretrain.errors import UserError
from cap_pretrain.training import lease, lock
from tests import toy

RUN, NAME = "gs://bucket/runs/a", "bucket/runs/a/run.lock"

HOLD = """
import sys, time
from cap_pretrain import files
from cap_pretrain.training import lock
lock.LEASE = float(sys.argv[2])
with lock.locked(files.place(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def elsewhere(bucket, **fields):
    """Change the lock to one of another machine."""
    stored = bucket.objects[NAME]
    stored.data = json.dumps(json.loads(stored.data) | {"boot": "other", **fields}).encode()


@pytest.fixture
def holder(bucket):
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLD, RUN, "1.2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=toy.CONFIGS.parent)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_killed_one_replaced_at_once(bucket, holder):
    who = rf"{RUN} is in use by process {holder.pid} on host '{re.escape(socket.gethostname())}'"
    with pytest.raises(UserError, match=who) as error, lock.locked(files.place(RUN)):
        pass
    assert len(str(error.value).splitlines()) == 1 and f"remove {RUN}/run.lock" in str(error.value)
    first = bucket.objects[NAME].generation
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    begun = time.monotonic()
    with lock.locked(files.place(RUN), pytest.fail):
        assert time.monotonic() - begun < 5 and bucket.objects[NAME].generation > first
    assert NAME not in bucket.objects
    with lock.locked(files.place(RUN)):
        pass


@pytest.mark.slow
def test_another_host_is_waited_for_and_replaced_once_it_no_longer_renews(bucket, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 1.2)
    run, said = files.place(RUN), []
    with lock.locked(run):  # renewed, as by another machine
        monkeypatch.setattr(lease, "_alive", lambda content: None)
        first = bucket.objects[NAME].generation
        with pytest.raises(UserError, match="in use by process"), lock.locked(run, said.append):
            pass
        assert bucket.objects[NAME].generation > first
    assert len(said) == 1 and re.search("waiting up to [01] s, in case that host is", said[0])
    files.write_text(run / "run.lock", json.dumps(lease.present()))
    begun = time.monotonic()
    with lock.locked(run, said.append):
        assert 0.1 < time.monotonic() - begun < 4
    assert len(said) == 2 and not bucket.objects
    files.write_text(run / "run.lock", "whatever")
    bucket.objects[NAME].updated -= 60
    with lock.locked(run, pytest.fail):
        pass


def test_of_runs_that_start_at_once_one_holds_the_lock(bucket, monkeypatch):
    monkeypatch.setattr(lease, "_alive", lambda content: content != b"{}")
    files.write_text(files.place(RUN) / "run.lock", "{}")
    held, refused, start = [], [], threading.Barrier(6)
    all_refused = threading.Event()

    def hold():
        start.wait()
        try:
            with lock.locked(files.place(RUN), lambda _: None):
                held.append(1)
                all_refused.wait(20)
        except UserError as error:
            refused.append(error)
            if len(refused) == 5:
                all_refused.set()

    threads = [threading.Thread(target=hold) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)


def test_a_lost_answer_does_not_lose_the_lock(bucket, monkeypatch):
    from cap_pretrain.files import buckets

    put = buckets.put

    def answered_late(path, data, generation=None):
        put(path, data, generation)
        raise FileExistsError(17, "as the repeated request is answered", str(path))

    monkeypatch.setattr(buckets, "put", answered_late)
    monkeypatch.setattr(lock, "LEASE", 0.6)
    with lock.locked(files.place(RUN), pytest.fail):
        first = bucket.objects[NAME].generation
        time.sleep(0.4)
        assert bucket.objects[NAME].generation > first
    assert not bucket.objects


@pytest.mark.slow
def test_who_loses_the_lock_ends(bucket, holder):
    elsewhere(bucket, id="of another run")
    bucket.objects[NAME].generation += 1
    assert holder.wait(10) == 75
