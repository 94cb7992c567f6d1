"""Checkpoints in a bucket count from their marker on; those without are removed or set aside."""

import contextlib
import threading

import pytest

from cap_pretrain import files
from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.checkpoints.folders import saved_steps
from cap_pretrain.checkpoints.stored import load_arrays, saved_identity
from cap_pretrain.errors import UserError
from tests import toy
from tests.checkpoints.test_checkpoint import abstract, make_state

RUN, NAME = "gs://bucket/runs/a", "bucket/runs/a/checkpoints"


def opened(read_only=False, **fields):
    return contextlib.closing(Checkpoints(RUN, toy.config(**fields), read_only=read_only))


@pytest.mark.slow
def test_checkpoints_live_in_a_bucket(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = {step: make_state(step, seed=step) for step in (2, 4, 6)}
    with contextlib.closing(
        Checkpoints(RUN, toy.config(), identity={"tokenizer/tokenizer.model": "abc"})
    ) as checkpoints:
        for state in states.values():
            checkpoints.save(state)
    assert saved_steps(RUN) == [4, 6]  # as config.checkpoint.keep_last says
    assert not bucket.names(f"{NAME}/2/")
    assert saved_identity(RUN, 6) == {"tokenizer/tokenizer.model": "abc"}
    before = dict(bucket.objects)
    with opened(read_only=True) as checkpoints:
        toy.assert_same(checkpoints.restore(abstract(states[4]), 4), states[4])
        toy.assert_same(checkpoints.restore_newest(abstract(states[6]), pytest.fail), states[6])
    assert load_arrays(RUN, 6).keys() == load_arrays_of_disk(states[6], tmp_path / "disk")
    assert bucket.objects == before
    assert not list(tmp_path.glob("gs*"))


def load_arrays_of_disk(state, workdir):
    checkpoints = Checkpoints(workdir, toy.config())
    checkpoints.save(state)
    checkpoints.close()
    return load_arrays(workdir, int(state.step)).keys()


def test_an_unfinished_checkpoint_never_counts_and_is_removed(bucket):
    with opened() as checkpoints:
        checkpoints.save(make_state(2))
        checkpoints.wait()
        copied, seen = {}, threading.Event()

        def keep():  # what a kill would leave, before the marker of the whole checkpoint
            copied.update(bucket.objects)
            seen.set()

        bucket.on("write", f"{NAME}/4/commit_success.txt", keep)
        checkpoints.save(make_state(4))
    assert seen.is_set() and saved_steps(RUN) == [2, 4]
    bucket.objects.clear()
    bucket.objects.update(copied)
    assert saved_steps(RUN) == [2] and len(bucket.names(f"{NAME}/4/")) > 5
    with opened(read_only=True) as checkpoints:
        assert checkpoints.latest_step() == 2
    assert bucket.names(f"{NAME}/4/")
    with opened() as checkpoints:
        assert not bucket.names(f"{NAME}/4/")
        assert checkpoints.restore_newest(abstract(make_state()), pytest.fail).step == 2
        checkpoints.save(make_state(4))
    assert saved_steps(RUN) == [2, 4]


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_set_aside_and_replaced_when_it_is_saved_again(bucket):
    older, newer = make_state(2), make_state(4, seed=1)
    with opened() as checkpoints:
        checkpoints.save(older)
        checkpoints.save(newer)
    data = [name for name in bucket.objects if f"{NAME}/4/learner/" in name and "/d/" in name]
    for name in data:
        bucket.objects[name].data = bucket.objects[name].data[:-9]
    messages = []
    for _ in range(2):  # also at the next start
        with opened() as checkpoints:
            toy.assert_same(checkpoints.restore_newest(abstract(newer), messages.append), older)
        assert saved_steps(RUN) == [2] and bucket.objects.keys() >= {*data}
    (message,) = messages
    assert message.startswith(f"{RUN}/checkpoints/4: is corrupt (")
    assert message.endswith("It is set aside: its commit_success.txt is removed.")
    assert files.place(f"{RUN}/checkpoints/4/damaged.txt").read_text().strip() in message
    with opened() as checkpoints:
        checkpoints.save(newer)
    with opened(read_only=True) as checkpoints:
        toy.assert_same(checkpoints.restore_newest(abstract(newer), pytest.fail), newer)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["*", "*/d/*"])  # written by Orbax, and by TensorStore
def test_a_bucket_that_cannot_be_written_ends_in_one_line(part, bucket):
    with opened() as checkpoints:
        checkpoints.save(make_state(2))
    checkpoints = Checkpoints(RUN, toy.config())
    bucket.fail("write", f"{NAME}/4/{part}", status=403)

    def save():
        checkpoints.save(make_state(4))
        checkpoints.wait()

    with pytest.raises(UserError, match="could not be saved .Permission denied") as raised:
        save()
    assert "resumes from step 2, which is intact" in str(raised.value)
    checkpoints.close()
    assert saved_steps(RUN) == [2]
