"""`log.profile_steps` traces these steps, once, into files that viewers read."""

import contextlib
import gzip
import json

import jax
import pytest

from cap_pretrain import files, train
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry import profiler
from tests import quick, toy


def stored(workdir, steps, kind):
    """Return the only file of a trace of this kind, where viewers look for it."""
    (path,) = (workdir / "profile" / "plugins" / "profile" / steps).glob(f"*.{kind}")
    return path


def steps_of(workdir, steps):
    """Return the numbers of the steps in a trace, as Perfetto and TensorBoard read it."""
    with gzip.open(stored(workdir, steps, "trace.json.gz"), "rt") as file:
        events = json.load(file)["traceEvents"]
    return [int(e["args"]["step_num"]) for e in events if e.get("name") == "train"]


@pytest.mark.slow
def test_the_steps_are_in_a_trace(tokenizer_path, tmp_path, capsys):
    c = toy.config(quick.NAME, text__tokenizer=str(tokenizer_path), log__profile_steps="2:3")
    c.total_steps = 4
    train.run(c, tmp_path)
    assert steps_of(tmp_path, "steps_2_3") == [2, 3]
    path = stored(tmp_path, "steps_2_3", "xplane.pb")
    assert f"A trace of the steps 2:3 is in {path.parent}." in capsys.readouterr().out
    space = jax.profiler.ProfileData.from_file(str(path))
    names = [e.name for plane in space.planes for line in plane.lines for e in line.events]
    assert names.count("train") == 2
    assert any("dot" in name or "fusion" in name for name in names)  # what the device computes

    c.total_steps, c.log.profile_steps = 5, "4:9"  # resumed after step 4, and at an end before 9
    train.run(c, tmp_path, allow_changes=["total_steps"])
    assert steps_of(tmp_path, "steps_4_9") == [5]
    assert "A trace of the steps 5:5 is in" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["3", "0:5", "5:4", "1:101", "a:b", ":", "1:2:3", "1:²"])
def test_invalid_steps_are_refused(text):
    with pytest.raises(UserError, match=r"log.profile_steps: .* is not FIRST:LAST"):
        profiler.parse(text)


def test_steps_after_the_run_are_remarked_on():
    assert "6:9 is not traced, because the run ends at step 5." in profiler.notes("6:9", 5)[0]
    assert not profiler.notes("5:9", 5) and not profiler.notes("", 5)


def test_valid_steps():
    assert profiler.parse("") == range(0)
    assert profiler.parse("1:100") == range(1, 101)


def test_a_trace_that_cannot_be_taken_does_not_end_the_run(tmp_path, monkeypatch):
    said = []
    traced = profiler.Profiler("1:2", tmp_path, said.append, contextlib.nullcontext).traced

    def busy(*_, **__):
        raise RuntimeError("another profile is running")

    monkeypatch.setattr(jax.profiler, "start_trace", busy)
    assert list(traced(iter([(1, "a"), (2, "b")]), lambda: None)) == [(1, "a"), (2, "b")]
    assert said == ["log.profile_steps: the steps 1:2 are not traced (another profile is running)."]


def test_a_trace_ends_when_the_devices_fail(tmp_path, monkeypatch):
    calls, said = [], []

    def state():
        calls.append("state")
        if len(calls) > 1:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    traced = profiler.Profiler("1:1", tmp_path, said.append, contextlib.nullcontext).traced
    assert list(traced(iter([(1, "a")]), state)) == [(1, "a")]
    assert calls == ["state", "state", "stop"]
    assert said == ["log.profile_steps: the steps 1:1 are not traced (out of memory)."]


def test_a_trace_goes_to_a_bucket(bucket):
    workdir = files.place("gs://bucket/run")
    traced = profiler.Profiler("2:2", workdir, print, contextlib.nullcontext).traced
    list(traced(iter([(1, "a"), (2, "b")]), lambda: None))
    found = [p.name for p in (workdir / "profile/plugins/profile/steps_2_2").iterdir()]
    assert sorted(name.partition(".")[2] for name in found) == ["trace.json.gz", "xplane.pb"]
