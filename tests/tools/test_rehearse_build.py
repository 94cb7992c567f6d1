"""Tests of tools/rehearse_build.py: of its kills with a fake build, and slowly as a whole."""

import itertools
import random
import subprocess
import sys

import pytest

from cap_pretrain.commands import rehearse_build
from tests.tools.launchers import ROOT


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return a list of what builds write: every third ends, whose content is the next of these."""
    contents, starts = [], itertools.count(1)

    class Build:
        seconds = 1.0

        def __init__(self, shards, out, workers):
            self._out = out

        def run(self, seconds=float("inf")):
            start = next(starts)
            if start % 3 and seconds < float("inf"):
                (self._out / ".mine.building" / "units").mkdir(parents=True, exist_ok=True)
                return True
            (self._out / "mine" / "1.0.0").mkdir(parents=True)
            (self._out / "mine" / "1.0.0" / "file").write_text(contents.pop(0))
            if start % 6 == 0:  # killed after its end
                return True
            for left in self._out.glob(".mine*/*"):
                left.rmdir()
                left.parent.rmdir()
            return False

    monkeypatch.setattr(rehearse_build, "Build", Build)
    (tmp_path / "straight" / "mine" / "1.0.0").mkdir(parents=True)
    (tmp_path / "straight" / "mine" / "1.0.0" / "file").write_text("same")
    return contents


def test_builds_that_end_early_are_compared_and_begun_again(fake, tmp_path, capsys):
    fake[:] = ["same"] * 3
    assert rehearse_build.killed(tmp_path, 1, 6, 10.0, random.Random(0)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "6 kills and 3 finished builds"
    assert not fake


def test_a_build_with_other_bytes_fails_and_is_kept(fake, tmp_path, capsys):
    fake[:] = ["same", "other"]
    assert rehearse_build.killed(tmp_path, 1, 5, 10.0, random.Random(0)) == 1
    assert "OTHER BYTES" in capsys.readouterr().out
    assert (tmp_path / "killed" / "mine" / "1.0.0" / "file").read_text() == "other"


@pytest.mark.slow
def test_a_rehearsal_of_a_small_build(tmp_path):
    script = ROOT / "tools" / "rehearse_build.py"
    options = ["--images", "300", "--kills", "3", "--folder", tmp_path / "rehearsal"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 kills and ")
