"""What a program shows while it works, on a terminal and in a log file."""

import io
import itertools
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cap_pretrain.telemetry import console
from cap_pretrain.telemetry.console import ERASE, Console

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(console, "SILENCE", 0.05)
    monkeypatch.setattr(console, "REDRAWN", 0.05)


def wait_for(pattern, stream):
    """Wait until the stream has a text; the bound is for a busy machine."""
    until = time.monotonic() + 60
    while not re.search(pattern, stream.getvalue()):
        assert time.monotonic() < until, stream.getvalue()
        time.sleep(0.01)


def test_a_log_file_is_told_that_work_goes_on(fast):
    stream = io.StringIO()
    shown = Console(stream)
    with shown.doing("Training a tokenizer"):
        wait_for(r"  … training a tokenizer: \d+ s\n", stream)
        shown.advance(1, 4)
        wait_for(r"  … 1 of 4 after \d+ s, about \d+ s left: training a tokenizer\n", stream)
    shown.say("done")
    shown.close()
    assert stream.getvalue().startswith("Training a tokenizer\n  … ")
    assert stream.getvalue().endswith("\ndone\n") and ERASE not in stream.getvalue()


def test_a_terminal_shows_the_activity_in_its_last_line(fast, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    shown = Console(stream)
    with shown.doing("Evaluating val", say=False) as task:
        task.advance(5, 10)
        wait_for(r"\[#{10}\.{10}\] 5 of 10 after \d+ s, about \d+ s left", stream)
        shown.say("a line")
    shown.close()
    lines = [line.split(ERASE)[-1] for line in stream.getvalue().split("\n")]
    assert lines == ["a line", ""]  # nothing of the activity is left
    assert all(len(frame) < 60 for frame in stream.getvalue().split(ERASE))


def test_without_a_console_in_use_nothing_is_shown(capsys):
    with console.doing("something"):
        console.advance(1, 2)
        console.say("a line")
    assert capsys.readouterr() == ("", "")
    with console.used() as outer, console.used() as inner:
        assert outer is inner and console.current() is outer
        outer.quiet = True
        console.say("on another host")
    assert console.current() is None and capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_quickstart_is_never_silent_and_has_a_loss_soon(tmp_path):
    """On two idle cores: no gap over 5 s, and the first loss within 15 s.

    On busy ones, gaps may be longer in proportion, and the first loss may cost 25 of the 30 seconds
    that two cores compute in that time.
    """
    command = [sys.executable, "-m", "cap_pretrain.main", f"--workdir={tmp_path}"]
    command += [f"--config={ROOT}/configs/quickstart.py", "--config.total_steps=2"]
    command += ["--config.evals.val.limit=8", "--config.evals.scenes.count=8"]
    begun, used = time.monotonic(), _cpu_seconds()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    lines = [(time.monotonic() - begun, line) for line in process.stdout]
    assert process.wait() == 0, lines
    ended = time.monotonic() - begun
    busy = max(1.0, ended / (_cpu_seconds() - used))  # seconds for one of computing
    times = [0.0, *(at for at, _ in lines), ended]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert max(gaps) < 5 * busy, lines
    first = next(at for at, line in lines if line.startswith("step 1/2  loss"))
    assert first < (15 if busy == 1 else 25 * busy), lines
    said = "".join(line for _, line in lines)
    for step in ("Opening scenes", "Training a tokenizer on the captions", "Compiling"):
        assert said.index(step) < said.index("step 1/2")
    assert "parameters, listed in" in said and "decoder/blocks" not in said
    assert f"Results: {tmp_path}" in said and said.count("\nNext: ") == 2
    assert "decoder/blocks" in (tmp_path / "parameters.txt").read_text()


def _cpu_seconds():
    """Return the CPU time of child processes that have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime
