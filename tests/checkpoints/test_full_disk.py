"""A full disk gives a short error, loses nothing already written, and the run can resume."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from cap_pretrain import evals, files, train
from cap_pretrain.telemetry.metrics import MetricsWriter
from tests import toy
from tests.test_train import CAPPA, make_config

full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")


@contextlib.contextmanager
def file_size_limit(size):
    """Limit the files of this process to `size` bytes, which acts like a full disk on a writer.

    Linux also sends a signal, which Python ignores.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@full_device
def test_the_error_of_a_log_names_it():
    log = files.Appended(Path("/dev/full"))
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device") as raised:
            log.write(b"some bytes")
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, "/dev/full")
    log.close()


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path):
    path = tmp_path / "new folder" / "file.json"
    files.write_text(path, "old")
    with file_size_limit(1000), pytest.raises(OSError, match="File too large") as raised:
        files.write_text(path, "n" * 1001)
    assert raised.value.filename == str(path)
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("metrics", "file"),
    [({f"{i}": 1 / 3 for i in range(9)}, "metrics.jsonl"), ({"a": 1.0}, "tensorboard")],
)
def test_metrics_resume_where_the_disk_was_full(metrics, file, tmp_path):
    writer = MetricsWriter(tmp_path)
    written = []

    def write_until_full():
        for step in range(1, 100):
            writer.write(step, metrics)
            written.append(step)

    with file_size_limit(1000), pytest.raises(OSError, match="File too large") as raised:
        write_until_full()
    assert file in raised.value.filename and 3 <= len(written) < 98
    writer.close()

    writer = MetricsWriter(tmp_path, keep_until=3)
    writer.write(4, metrics)
    writer.close()
    assert toy.lines(tmp_path) == [{"step": step} | metrics for step in (1, 2, 3, 4)]


@pytest.mark.slow  # three processes
@full_device
def test_a_result_that_does_not_fit_stops_a_run_that_can_go_on(
    tokenizer_path, tmp_path, monkeypatch
):
    config = make_config(CAPPA, tokenizer_path, checkpoint__every_steps=1, eval__every_steps=1)
    config.evals = ConfigDict({"val": evals.defaults("loss", limit=8)})
    blocked = tmp_path / "evals" / "val" / "1.json.tmp"
    write = Path.write_bytes

    def write_to_full(path, data):
        return write(Path("/dev/full") if path == blocked else path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_to_full)
        with pytest.raises(OSError, match="No space left on device") as raised:
            train.run(config, tmp_path)
    assert raised.value.filename == str(blocked.with_suffix(""))
    train.run(config, tmp_path)
    steps = list(range(1, config.total_steps + 1))
    assert [line["step"] for line in toy.losses(tmp_path)] == steps
    assert {path.name for path in blocked.parent.iterdir()} == {f"{step}.json" for step in steps}


SMALL = {
    "total_steps": 12,
    "batch_size": 4,
    "dtype": "float32",
    **{"model.name": "mu/8", "model.width": 128, "model.depth": 1, "model.mlp": 128},
    **{"data.image_size": 16, "data.scenes.length_train": 200, "data.scenes.length_val": 20},
    **{"text.length": 16, "text.vocab_size": 100},
    **{"log.every_steps": 1, "eval.every_steps": 0, "checkpoint.keep_last": 9},
    **{"evals.scenes.count": 4, "evals.samples.count": 4, "evals.val.limit": 4},
}


class SmallDisk:
    """Runs the program on a separate in-memory disk that only it and its children see."""

    def __init__(self, folder):
        self._folder = folder
        self._disk = folder / "disk"
        self._disk.mkdir()
        # Without root, mounting works inside a new user namespace.
        self._private = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]

    def allowed(self):
        command = [*self._private, "mount", "-t", "tmpfs", "tmpfs", self._disk]
        return subprocess.run(command, capture_output=True).returncode == 0

    def run_twice(self, size, **config):
        """Run on a disk of `size`, then enlarge that disk and run again.

        Returns:
            Exit code, stdout and stderr of each run, and the final workdir.
        """
        fields = [f"--config.{field}={value}" for field, value in (SMALL | config).items()]
        quickstart = f"--config={toy.CONFIGS / 'quickstart.py'}"
        workdir = self._disk / "run"
        program = [sys.executable, "-m", "cap_pretrain.main", quickstart, f"--workdir={workdir}"]
        script = """
            disk=$1 size=$2 out=$3; shift 3
            mount -t tmpfs -o size=$size tmpfs $disk || exit
            "$@" >$out/1.out 2>$out/1.err; echo $? >$out/1.code
            mount -o remount,size=200m $disk
            "$@" >$out/2.out 2>$out/2.err; echo $? >$out/2.code
            cp -r $disk/run $out/run
        """
        arguments = [self._disk, size, self._folder, *program, *fields]
        subprocess.run(
            [*self._private, "sh", "-c", script, "sh", *arguments],
            cwd=toy.CONFIGS.parent,
            check=True,
            timeout=300,
        )

        def read(name):
            return (self._folder / name).read_text()

        runs = [(int(read(f"{i}.code")), read(f"{i}.out"), read(f"{i}.err")) for i in (1, 2)]
        return *runs, self._folder / "run"


@pytest.fixture
def small_disk(tmp_path):
    disk = SmallDisk(tmp_path)
    if not disk.allowed():
        pytest.skip("an in-memory disk cannot be mounted here")
    return disk


def saved(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit(small_disk):
    """Two checkpoints of 5.3 MB each fit on the disk."""
    first, second, workdir = small_disk.run_twice("14m", **{"checkpoint.every_steps": 3})
    code, _, err = first
    assert code == 2
    assert "No space left on device" in err and "resumes from step 6, which is intact" in err
    assert len(err.splitlines()) <= 2
    code, out, err = second
    assert (code, err) == (0, "")
    assert "Resuming from step 6." in out
    assert saved(workdir) == ["12", "3", "6", "9"]
    assert [line["step"] for line in toy.losses(workdir)] == list(range(1, 13))


@pytest.mark.slow
def test_metrics_that_do_not_fit(small_disk):
    """The disk holds the tokenizer (250 kB) and the metrics of only some of the 200 steps."""
    first, second, workdir = small_disk.run_twice(
        "320k", **{"total_steps": 200, "checkpoint.every_steps": 200}
    )
    code, _, err = first
    assert code == 2
    assert "No space left on device" in err and len(err.splitlines()) <= 2
    assert "metrics.jsonl: " in err or "tfevents" in err
    code, _, err = second
    assert (code, err) == (0, "")
    assert saved(workdir) == ["200"]
    assert [line["step"] for line in toy.losses(workdir)] == list(range(1, 201))
