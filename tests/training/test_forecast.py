"""What a dry run foresees."""

import functools
import json

import pytest

from cap_pretrain.optim import optimizers
from cap_pretrain.telemetry.flops import Peak
from cap_pretrain.training import forecast
from tests import quick, toy

PHASES = [{"stop": 750, "training": 1e9}, {"stop": 1000, "training": 5e9}]
PLAN = {"total_steps": 1000, "batch_size": 10, "flops_per_example": {"training": 2e9}}
PLAN["phases"] = PHASES


def test_the_duration_is_that_of_an_earlier_start_or_follows_from_the_peak(tmp_path, monkeypatch):
    peaks = [Peak(1e12, "MFU(cpu)", "a CPU"), Peak(None, "MFU", "the peak is unknown")]
    monkeypatch.setattr(forecast.flops, "system_peak", lambda _: peaks.pop(0))
    seconds, line = forecast.duration(PLAN, tmp_path)
    assert seconds == pytest.approx(1000 * 2e10 / (0.2 * 1e12))
    assert line.startswith("1,000 steps take about 2 min, 100 ms each (estimated, for 20% of a CPU")
    unknown = "how long it takes is unknown: the peak is unknown"
    assert forecast.duration(PLAN, tmp_path) == (0.0, unknown)
    steps = [{"step": k, "time/step_ms": ms} for k, ms in ((1, 9000), (2, 25), (760, 175))]
    times = "".join(json.dumps(step) + "\n" for step in steps)
    (tmp_path / "metrics.jsonl").write_text(times)
    seconds, line = forecast.duration(PLAN, tmp_path)
    assert seconds == pytest.approx(70) and "as measured in this workdir" in line


def test_a_step_is_said_to_fit_or_not(monkeypatch):
    c = toy.config(quick.NAME)
    optimizer = functools.partial(optimizers.build, c.optim, rate=lambda _: 0.1)
    monkeypatch.setattr(forecast, "_limit", lambda _: (2**30, "main memory"))
    entries, text = forecast.memory(c, 100, optimizer)
    assert entries["activations"] > 0 and entries["limit"] == 2**30
    assert "\nit fits into 1.00 GiB of main memory" in text
    monkeypatch.setattr(forecast, "_limit", lambda _: (1000, "the memory of a chip"))
    assert "\nIT DOES NOT FIT into 0.0 MiB" in forecast.memory(c, 100, optimizer)[1]
    monkeypatch.setattr(forecast, "_limit", lambda _: (0, ""))
    assert "fit" not in forecast.memory(c, 100, optimizer)[1].replace("activations", "")
