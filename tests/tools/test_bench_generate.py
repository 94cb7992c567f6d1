"""Tests of tools/bench_generate.py: both candidates write captions of the same shape."""

import subprocess
import sys

import pytest

from tests import toy
from tests.parity import require


@pytest.mark.slow
@pytest.mark.parity
def test_measures_both(tmp_path):
    require("transformers")
    # In a subprocess, because it restricts itself to one core.
    command = [sys.executable, "-m", "tools.bench_generate", "--model=mu/16", "--vocab_size=50"]
    command += ["--tokens=4", "--batch_size=2", "--beams=3", "--length=5", "--rounds=1"]
    done = subprocess.run(
        [*command, "--threads=1"], capture_output=True, text=True, cwd=toy.CONFIGS.parent
    )
    assert done.returncode == 0, done.stderr
    assert "depth=1" in done.stdout and "3 beams, captions of 5; threads: 1" in done.stdout
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["cap_pretrain", "transformers.generate"]
    (_, seconds, rate, _), other = ([float(x) for x in ["0", *row[1:]]] for row in rows)
    assert rate == pytest.approx(2 * 5 / seconds, rel=0.01) and other[3] == 1
