"""Builds in several processes, killed and resumed, give the same dataset."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import simplejpeg

from cap_pretrain.commands import rehearse_build
from cap_pretrain.commands.rehearse_build import contents
from cap_pretrain.data.builders import units
from tests.data.test_question_formats import build
from tests.data.test_tables import parquet
from tests.data.test_webdataset import sample, samples, tar
from tests.tools.test_build_dataset import jpeg, read, report, run, write_files


def numbered(tmp_path, count):
    """Return options for a CSV; every seventh image is corrupt, every fifth lacks a caption."""
    files = {f"{k}.jpg": b"x" if k % 7 == 0 else jpeg(k) for k in range(count)}
    lines = [f"{k}.jpg,{'' if k % 5 == 0 else f'caption {k}'}" for k in range(count)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *lines]))
    return "--tables", tmp_path / "t.csv", "--images", write_files(tmp_path / "photos", files)


def test_units_and_workers_do_not_affect_the_dataset(tmp_path, monkeypatch):
    arguments = numbered(tmp_path, 40)
    whole = contents(build(tmp_path, "csv", *arguments))
    monkeypatch.setattr(units, "_LEAST", 7)
    for workers in (1, 2):
        again = build(tmp_path, "csv", *arguments, "--overwrite", "--workers", str(workers))
        assert contents(again) == whole
    assert report(again)["train"]["kept"] == 40 - 6 - 8 + 2


def test_a_dataset_that_was_being_replaced_is_not_lost(tmp_path):
    arguments = numbered(tmp_path, 4)
    dataset = build(tmp_path, "csv", *arguments)
    whole = contents(dataset)
    options = ("csv", "--name", "mine", "--out", dataset.parent, *arguments)
    # As a kill leaves it between moving the old dataset away and the new one to its place.
    replaced = dataset.parent / ".mine.building" / "replaced"
    for more in ((), ("--overwrite", "--images", tmp_path / "missing")):
        replaced.parent.mkdir(exist_ok=True)
        (dataset / "1.0.0").rename(replaced)
        assert run(*options, *more) == 2
        assert contents(dataset) == whole


def test_units_that_are_finished_are_not_made_again(tmp_path, monkeypatch, capsys):
    arguments = ("csv", "--name", "mine", "--out", tmp_path / "out", *numbered(tmp_path, 40))
    monkeypatch.setattr(units, "_LEAST", 10)
    made, stop_at = [], 2

    def counted(builder, unit, *rest, make=units.make):
        if len(made) == stop_at:
            raise KeyboardInterrupt
        made.append(unit.number)
        make(builder, unit, *rest)

    monkeypatch.setattr(units, "make", counted)
    assert run(*arguments) == 130
    (tmp_path / "out" / ".mine.building" / "units" / "train-000002.unit.9.tmp").write_bytes(b"half")
    stop_at = 4
    assert run(*arguments) == 0
    assert made == [0, 1, 2, 3]
    made.clear()
    stop_at = 2
    assert run(*arguments, "--overwrite") == 130
    stop_at = 6
    assert run(*arguments, "--overwrite", "--min_words", "2") == 0, "another build"
    assert made == [0, 1, 0, 1, 2, 3]
    made.clear()
    stop_at = 2
    assert run(*arguments, "--overwrite") == 130
    (tmp_path / "t.csv").write_text((tmp_path / "t.csv").read_text() + "\nnew.jpg,more")
    stop_at = 7
    assert run(*arguments, "--overwrite") == 0, "of another table"
    assert made == [0, 1, 0, 1, 2, 3, 4]


def test_rows_of_parquet_files_with_images_are_numbered_throughout(tmp_path):
    for shard in range(2):
        own = [{"bytes": jpeg(k), "path": None} for k in (2 * shard, 2 * shard + 1)]
        texts = [f"caption {2 * shard}", f"caption {2 * shard + 1}"]
        parquet(tmp_path / "p" / f"{shard}.parquet", image=own, caption=texts)
    folder = build(tmp_path, "parquet", "--tables", tmp_path / "p")
    examples = read(folder, "train")
    assert {key: e["captions"][0] for key, e in examples.items()} == {
        str(k): f"caption {k}" for k in range(4)
    }


def die(unit):
    os._exit(9)


def test_a_dead_worker_is_reported_and_the_build_resumes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(units, "_work", die)
    for shard in range(2):
        tar(tmp_path / "s" / f"{shard}.tar", samples(2, start=2 * shard))
    arguments = ("webdataset", "--name", "mine", "--out", tmp_path / "out")
    arguments += ("--shards", tmp_path / "s")
    assert run(*arguments, "--workers", "2") == 1
    assert "a worker process has died" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(*arguments) == 0


def test_a_full_disk_is_reported_and_the_build_resumes(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    arguments = ("csv", "--name", "mine", "--out", tmp_path / "out", *numbered(tmp_path, 9))
    with monkeypatch.context() as patch:
        patch.setattr(units.os, "replace", full)
        assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert "No space left on device; fix this and run again to resume." in error
    assert len(error.splitlines()) == 1
    assert run(*arguments) == 0


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(rehearse_build.ROOT)}


@pytest.mark.slow
def test_kills_change_nothing(tmp_path):
    tars = tmp_path / "tars"
    planted, candidates = rehearse_build.write_tars(tars, 400, per_tar=50, size=(64, 48))
    assert planted.keys() == {
        "broken",
        "without captions",
        "duplicate image",
        "near-duplicate image",
        "rest of a tar that is cut off",
    }
    assert not rehearse_build.Build(tars, tmp_path / "whole", workers=1).run()
    kept = candidates - sum(planted.values())
    assert rehearse_build.reported(tmp_path / "whole" / "mine") == (planted, candidates, kept)

    out = tmp_path / "killed"
    units_of = out / ".mine.building" / "units"
    for workers, made in ((2, 1), (1, 3), (2, 5), (1, 7), (2, 8)):
        build = rehearse_build.Build(tars, out, workers).process
        while len(list(units_of.glob("*.unit"))) < made and build.poll() is None:
            time.sleep(0.01)
        build.send_signal(signal.SIGKILL)
        build.wait()
    assert not rehearse_build.Build(tars, out, workers=1).run()
    assert contents(out / "mine") == contents(tmp_path / "whole" / "mine")
    assert [path.name for path in out.iterdir()] == ["mine"]


PEAK = """
import sys
from cap_pretrain.commands import build_dataset
assert build_dataset.main(sys.argv[1:]) == 0
with open("/proc/self/status") as file:
    print(*(line.split()[1] for line in file if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """The builds have more images than are shuffled in memory, and four times as many."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 200, 200, 3), np.uint8)
    files = [simplejpeg.encode_jpeg(pixels, 95) for pixels in noise]
    peaks = []
    for count in (1500, 6000):
        for shard in range(0, count, 500):
            keys = [f"{k:09}" for k in range(shard, shard + 500)]
            members = [m for k, key in enumerate(keys) for m in sample(key, files[k % 4], key)]
            tar(tmp_path / str(count) / f"{shard:05}.tar", members)
        arguments = ["webdataset", "--name", "mine", "--out", tmp_path / f"out{count}"]
        arguments += ["--shards", tmp_path / str(count)]
        program = [sys.executable, "-c", PEAK, *map(str, arguments)]
        done = subprocess.run(program, env=ENVIRONMENT, check=True, capture_output=True, text=True)
        assert report(tmp_path / f"out{count}" / "mine")["train"]["kept"] == count
        peaks.append(int(done.stdout.split()[-1]) / 1024)  # MiB
    print(f"peak memory in MiB: {peaks}")
    assert peaks[1] < peaks[0] + 30
    assert 4500 * len(files[0]) > 100 * 2**20
