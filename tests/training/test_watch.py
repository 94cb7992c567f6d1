"""What the loop keeps an eye on: bad steps, spikes, the examples seen, signals."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from cap_pretrain.errors import UserError
from cap_pretrain.training.watch import StopRequest, Watch
from tests import toy


class Log:
    """Stands for the metrics writer and the console."""

    def __init__(self):
        self.lines, self.said = [], []

    def write(self, step, metrics):
        self.lines.append((step, dict(metrics)))

    def say(self, text):
        self.said.append(text)


def watched(losses, tmp_path, **fields):
    """The log of a run with these losses; a bad one counts as skipped, as the step does it."""
    log, skipped = Log(), 0
    watch = Watch(toy.config(**fields), tmp_path, log, log)
    for step, loss in enumerate(losses, 1):
        skipped += not np.isfinite(loss)
        metrics = {"loss": loss, "grad_norm": 1.0, "update_norm": 1.0, "param_norm": 1.0}
        if fields.get("optim__skip_bad_steps"):
            metrics["skipped"] = skipped
        watch.add(step, {k: np.float32(v) for k, v in metrics.items()})
    watch.check()
    return log


def faults(counts, tmp_path, **fields):
    """What is the matter after each step of a run that so many broken images have come by."""
    log = Log()
    watch = Watch(toy.config(**fields), tmp_path, log, log)
    good = {"loss": 1.0, "grad_norm": 1.0, "update_norm": 1.0, "param_norm": 1.0}
    told = []
    for step, count in enumerate(counts, 1):
        watch.add(step, good | {"data/broken": count})
        watch.check()
        told.append(watch.fault)
    return told


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("saved", [False, True])
def test_the_advice_fits_the_run(clip_norm, saved, tmp_path):
    if saved:
        (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        watched([1.0, np.nan], tmp_path, optim__clip_norm=clip_norm)
    message = str(error.value)
    assert ("Lower optim.lr or optim.clip_norm" in message) == bool(clip_norm)
    assert ("or set optim.clip_norm" in message) == (not clip_norm)
    assert ("is intact" in message) == saved and ("no checkpoint was" in message) == (not saved)


def test_too_many_broken_images_among_the_last_are_a_fault(tmp_path):
    # Batches of 1000, so a window of 10 steps and 10,000 examples: 100 may be broken.
    few = [10 * step for step in range(50)]
    assert not any(faults(few, tmp_path, batch_size=1000))
    told = faults([*few, 499, 511], tmp_path, batch_size=1000)
    assert not any(told[:51])
    assert told[51].startswith("step 52: 101 of the last 10,000 examples did not decode")
    assert "data.max_broken=0.01" in told[51] and f"{tmp_path}/broken.jsonl." in told[51]
    many = [1000 * step for step in range(30)]
    assert not any(faults(many, tmp_path, batch_size=1000, data__max_broken=1.0))
    assert not any(faults([9_000_000], tmp_path)), "those of earlier starts do not count"


def test_a_spike_is_told_and_logged(tmp_path):
    losses = list(2 + 0.1 * np.random.default_rng(0).normal(size=60))
    losses[40] = 9.0
    log = watched(losses, tmp_path)
    ((step, figures),) = log.lines
    assert step == 41 and figures["spike/loss"] == 9.0
    assert figures["spike/median"] == pytest.approx(2.0, abs=0.1)
    assert log.said == [
        f"step 41: the loss spikes to 9.0000, around {np.median(losses[:40]):.4f} before"
    ]
    assert watched(losses, tmp_path, log__spikes=0.0).lines == []
    assert watched(losses[31:], tmp_path).lines == []  # too few steps to judge by


def test_a_falling_loss_is_no_spike(tmp_path):
    assert watched(10 * 0.97 ** np.arange(300), tmp_path).lines == []


def test_bad_steps_end_the_run_when_there_are_more_than_allowed(tmp_path):
    losses = [1.0, np.nan, 1.0, np.inf, 1.0, np.nan]
    log = watched(losses[:5], tmp_path, optim__skip_bad_steps=2)
    assert log.said == [
        "step 2: loss is nan; skipped, 1 of 2 allowed",
        "step 4: loss is inf; skipped, 2 of 2 allowed",
    ]
    with pytest.raises(UserError, match=r"step 6: loss is nan \(2 such steps were skipped\)"):
        watched(losses, tmp_path, optim__skip_bad_steps=2)
    with pytest.raises(UserError, match="step 2: loss is nan; nothing was saved since") as error:
        watched(losses, tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("first", StopRequest.SIGNALS)
def test_the_first_signal_is_remembered_and_handlers_come_back(first):
    before = [signal.getsignal(s) for s in StopRequest.SIGNALS]
    with StopRequest() as request:
        assert not request.is_set()
        os.kill(os.getpid(), first)
        assert request.is_set() and request.signal == first
        assert all(signal.getsignal(s) == signal.SIG_DFL for s in StopRequest.SIGNALS)
    assert [signal.getsignal(s) for s in StopRequest.SIGNALS] == before


@pytest.mark.parametrize("second", StopRequest.SIGNALS)
def test_the_second_signal_ends_at_once(second):
    program = (
        "import os, signal, sys, time\n"
        "from cap_pretrain.training.watch import StopRequest\n"
        "with StopRequest():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
        f"    os.kill(os.getpid(), {int(second)})\n"
        "    time.sleep(20)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -second and done.stdout == "still here\n"
