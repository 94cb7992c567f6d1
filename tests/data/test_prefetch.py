"""Threads and worker processes change nothing about batches, and end when they should."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from cap_pretrain.data.prefetch import iterate
from cap_pretrain.errors import UserError
from tests.data.numbers import Numbers, assert_same


@pytest.mark.parametrize(
    "options", [{"threads": 0}, {"threads": 3, "prefetch": 1}, {"prefetch": 9}]
)
def test_threads_and_prefetch_change_nothing(build, options):
    dataset = build()
    got = list(iterate(build(), 5, 17, **options))
    assert len(got) == 12
    for t, batch in zip(range(5, 17), got, strict=True):
        assert_same(batch, dataset[t])


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_worker_processes_change_nothing(build, workers):
    dataset = build()
    with contextlib.closing(iterate(build(), 6, 11, workers=workers, prefetch=3)) as batches:
        for t, batch in zip(range(6, 11), batches, strict=True):
            assert_same(batch, dataset[t])
    assert not multiprocessing.active_children()


def test_the_plan_follows_what_is_consumed(build):
    planned = []
    with contextlib.closing(iterate(build(), 5, 9, plan=planned.append)) as batches:
        assert planned == [5]
        for expected in range(6, 9):
            next(batches)
            assert planned[-1] == expected
    assert planned == [5, 6, 7, 8]


class Unreadable(Numbers):
    def __getitem__(self, i):
        raise UserError("dataset 'numbers': record is damaged")


def test_user_errors_come_out_of_threads_and_workers_as_they_were(build):
    dataset = build([(Unreadable(50), 1.0)])
    for workers in (0, 1):
        batches = iterate(dataset, workers=workers)
        with pytest.raises(UserError) as raised:
            next(batches)
        assert str(raised.value) == "dataset 'numbers': record is damaged"
        batches.close()
        batches.close()  # as when the process ends


class Deadly(Numbers):
    """Kills any process that reads it, as the kernel does when memory runs out."""

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_raises(build):
    with (
        contextlib.closing(iterate(build([(Deadly(50), 1.0)]), workers=1)) as batches,
        pytest.raises(UserError, match="exit code -9.*shared memory"),
    ):
        next(batches)


_KILLED_WHILE_READING = """
import os, signal, sys
from cap_pretrain.data.pipeline import ImageOptions, train_dataset
from cap_pretrain.data.prefetch import iterate
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer
from tests.data.numbers import Numbers

tokenizer = SentencePieceTokenizer(sys.argv[1])
image = ImageOptions(8)
dataset = train_dataset([(Numbers(30), 1.0)], tokenizer, image, batch_size=2, seed=0)
batches = iterate(dataset, workers=1)
next(batches)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_do_not_outlive_a_killed_parent(tokenizer):
    _, (model, *_) = tokenizer.__reduce__()
    command = [sys.executable, "-c", _KILLED_WHILE_READING, model]
    # Returns when all processes that hold the pipe have ended.
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=90)
    assert done.returncode == -signal.SIGKILL


def test_iterating_an_empty_range_gives_nothing(build):
    assert list(iterate(build(), 5, 5)) == list(iterate(build(), 5, 3, workers=2)) == []
