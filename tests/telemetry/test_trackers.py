"""Trackers besides TensorBoard: what they receive, resuming, and that no run depends on them."""

import json
import struct
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from cap_pretrain import train, validation
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry import trackers
from cap_pretrain.telemetry.metrics import MetricsWriter, read_metrics
from cap_pretrain.telemetry.trackers import guard
from tests import quick, toy

CONFIG = {"seed": 0, "data": {"dir": "gs://user:hunter2@bucket/data", "name": "scenes"}}
IMAGES = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
CAPTIONS = ["a red square", "a <b>blue</b> disc"]


class Fake:
    """Keeps what it receives; `RUNS` outlast the process that a test plays."""

    RUNS: dict[str, dict] = {}

    def __init__(self, run, identity):
        self.identity = identity or f"run{len(self.RUNS)}"
        self.kept = self.RUNS.setdefault(self.identity, {"points": [], "rest": [], "ends": []})
        self.kept["config"] = run.fields()

    def scalars(self, step, values):
        self.kept["points"] += [(step, tag, value) for tag, value in values.items()]

    def text(self, step, tag, text):
        self.kept["rest"].append((step, tag, text))

    def images(self, step, tag, images, captions):
        self.kept["rest"].append((step, tag, images.tolist(), captions))

    def close(self, failed):
        self.kept["ends"].append(failed)


class Failing(Fake):
    def scalars(self, step, values):
        raise ConnectionError("POST https://me:hunter2@host/api?key=abcdef123456 refused\nagain")


@pytest.fixture
def fake(monkeypatch):
    """Register the tracker `fake`, whose package is this one, and return its runs by id."""
    monkeypatch.setattr(Fake, "RUNS", {})
    entry = trackers.Entry(f"{__name__}:Fake", "FAKE_SILENT", "1")
    monkeypatch.setitem(trackers.REGISTRY, "fake", entry)
    return Fake.RUNS


def opened(workdir, names, keep_until=-1, say=print, trains=True):
    """Start or resume a run, as the training loop does."""
    workdir.mkdir(exist_ok=True)
    run = trackers.Run(workdir, CONFIG, read_metrics(workdir), keep_until, trains)
    started = trackers.start(names, run, say)
    return MetricsWriter(workdir, True, keep_until, started)


def power_cut(writer):
    """End a process without closing anything, after what it sent has arrived."""
    for tracker in writer._trackers:
        while not tracker._calls.empty():
            time.sleep(0.01)
    time.sleep(0.05)


def test_a_tracker_receives_what_tensorboard_does(fake, tmp_path):
    writer = opened(tmp_path, "tensorboard+fake")
    writer.write(1, {"train/loss": 0.5, "train/acc": np.float32("nan")})
    writer.images(1, "captions", IMAGES, CAPTIONS)
    writer.text(1, "note", "text")
    writer.close()
    assert list((tmp_path / "tensorboard").iterdir())
    (run,) = fake.values()
    (loss, accuracy) = run["points"]
    assert loss == (1, "train/loss", 0.5) and np.isnan(accuracy[2])
    assert run["rest"] == [(1, "captions", IMAGES.tolist(), CAPTIONS), (1, "note", "text")]
    assert run["config"] == {"seed": 0, "data.dir": "gs://bucket/data", "data.name": "scenes"}
    assert run["ends"] == [False]


def test_a_resumed_run_goes_on_in_the_same_run_and_no_step_is_sent_twice(fake, tmp_path):
    writer = opened(tmp_path, "fake")
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": step / 2})
    writer.write(2, {"captions/cider": 1.0})
    writer.images(2, "captions", IMAGES, CAPTIONS)
    power_cut(writer)  # the checkpoint is of step 1

    writer = opened(tmp_path, "fake", keep_until=1)
    for step in (2, 3, 4):
        writer.write(step, {"train/loss": step / 2})
        writer.write(step, {"captions/cider": 1.0})
        writer.images(step, "captions", IMAGES, CAPTIONS)
    writer.close(failed=True)
    assert list(fake) == ["run0"]
    points = fake["run0"]["points"]
    assert sorted(points) == sorted(
        [(s, "train/loss", s / 2) for s in (1, 2, 3, 4)]
        + [(s, "captions/cider", 1.0) for s in (2, 3, 4)]
    )
    assert [step for step, *_ in fake["run0"]["rest"]] == [2, 3, 4]
    assert fake["run0"]["ends"] == [True]


def test_a_tracker_added_to_a_resumed_run_gets_the_earlier_figures(fake, tmp_path):
    writer = opened(tmp_path, "")
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": step / 2})
    writer.close()
    writer = opened(tmp_path, "fake", keep_until=2)
    writer.write(3, {"train/loss": 1.5})
    writer.close()
    assert fake["run0"]["points"] == [(s, "train/loss", s / 2) for s in (1, 2, 3)]


def test_a_tracker_that_fails_warns_once_without_secrets_and_the_rest_goes_on(
    fake, monkeypatch, tmp_path
):
    entry = trackers.Entry(f"{__name__}:Failing", "FAKE_SILENT", "1")
    monkeypatch.setitem(trackers.REGISTRY, "failing", entry)
    monkeypatch.setenv("SOME_API_KEY", "abcdef123456")
    said = []
    writer = opened(tmp_path, "failing+fake", say=said.append)
    for step in (1, 2, 3):
        writer.write(step, {"train/loss": 0.5})
        power_cut(writer)
    writer.close()
    (line,) = said
    assert line == (
        "failing: failed and gets nothing more; the run goes on: ConnectionError: "
        "POST https://host/api?key=… refused again"
    )
    assert len(fake["run1"]["points"]) == len(read_metrics(tmp_path)) == 3


def test_a_tracker_that_cannot_be_opened_or_hangs_does_not_stop_the_run(
    fake, monkeypatch, tmp_path
):
    said, release = [], threading.Event()
    monkeypatch.setattr(Fake, "scalars", lambda *_: release.wait())
    monkeypatch.setattr(guard, "CLOSE_S", 0.2)
    monkeypatch.setattr(guard, "MAX_WAITING", 3)
    for _ in range(2):  # the second time, trackers.json is damaged
        writer = opened(tmp_path, "fake", say=said.append)
        for step in range(9):
            writer.write(step, {"train/loss": 0.5})
        writer.close()
        (tmp_path / "trackers.json").write_text("[]")
    release.set()
    assert ["3 reports wait for it" in said[0], "could not be opened" in said[1]] == [True, True]
    assert len(said) == 2
    assert len(read_metrics(tmp_path)) == 9


def test_a_tracker_that_hangs_delays_neither_the_start_nor_a_stop(fake, monkeypatch, tmp_path):
    said, release, init = [], threading.Event(), Fake.__init__
    one_by_one = threading.Lock()

    def hang(self, run, identity):
        release.wait()
        with one_by_one:
            init(self, run, identity)

    monkeypatch.setattr(Fake, "__init__", hang)
    monkeypatch.setattr(guard, "EARLY_S", 0.1)
    monkeypatch.setitem(trackers.REGISTRY, "other", trackers.REGISTRY["fake"])
    begun = time.monotonic()
    writer = opened(tmp_path, "fake+other", say=said.append)
    writer.write(1, {"train/loss": 0.5})
    writer.close(failed=True)
    assert time.monotonic() - begun < 10 and len(said) == 2
    release.set()
    for tracker in writer._trackers:
        tracker._thread.join()
    assert [run["points"] for run in fake.values()] == [[(1, "train/loss", 0.5)]] * 2
    assert json.loads((tmp_path / "trackers.json").read_text()).keys() == {"fake", "other"}


def test_a_repeated_evaluation_sends_its_new_figures(fake, tmp_path):
    for value in (0.5, 0.75):
        writer = opened(tmp_path, "fake", keep_until=0, trains=False)
        writer.write(0, {"probe/accuracy": value})
        writer.close()
    assert fake["run0"]["points"] == [(0, "probe/accuracy", 0.5), (0, "probe/accuracy", 0.75)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("wandb+mlflwo", r"log.trackers: no tracker 'mlflwo'. Did you mean 'mlflow'\?"),
        ("absent", r"log.trackers: the package of absent is not installed; run pip install 'cap_"),
    ],
)
def test_a_tracker_that_cannot_be_used_is_refused_before_anything_is_built(
    names, message, monkeypatch, tmp_path
):
    (tmp_path / "absent").mkdir()  # a folder is no package
    monkeypatch.syspath_prepend(tmp_path)
    entry = trackers.Entry("nowhere:Nothing", "FAKE_SILENT", "1")
    monkeypatch.setitem(trackers.REGISTRY, "absent", entry)
    c = toy.config(quick.NAME, log__trackers=names)
    with pytest.raises(UserError, match=message):
        validation.validate(c)


@pytest.mark.slow
def test_the_training_loop_reports_to_trackers(fake, monkeypatch, tmp_path, tokenizer_path):
    monkeypatch.setattr(
        trackers.importlib.util, "find_spec", lambda _: SimpleNamespace(origin="here")
    )
    for steps in (2, 3):
        c = toy.config(
            quick.NAME,
            total_steps=steps,
            text__tokenizer=str(tokenizer_path),
            log__trackers="fake",
        )
        train.run(c, tmp_path, ["total_steps"])
    (run,) = fake.values()
    logged = read_metrics(tmp_path)
    assert run["points"] == [
        (line["step"], tag, value)
        for line in logged
        for tag, value in line.items()
        if tag != "step"
    ]
    assert run["config"]["log.trackers"] == "fake" and run["ends"] == [False, False]


def wandb_data(path):
    """Yield the records of a .wandb file, in the format of LevelDB's logs after 7 bytes.

    Blocks of 32 KiB hold chunks of checksum, length and kind: 1 a whole record, 2, 3 and 4 the
    first, a middle and the last part of one.
    """
    content, at, record = path.read_bytes(), 7, b""
    while at < len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block is padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def wandb_records(folder):
    """Return the history rows, config keys and run ids in the files of offline runs."""
    from wandb.proto import wandb_internal_pb2

    rows, keys, ids = [], set(), set()
    for path in sorted(folder.glob("offline-run-*/run-*.wandb")):
        for data in wandb_data(path):
            record = wandb_internal_pb2.Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.add(record.run.run_id)
                keys |= {item.key for item in record.run.config.update}
            elif kind == "history":
                items = {
                    ".".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.append({k: v for k, v in items.items() if not k.startswith("_")})
    return rows, keys, ids


@pytest.mark.slow
def test_wandb_offline(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install -e '.[wandb]'")
    for name, value in {"MODE": "offline", "SILENT": "true", "API_KEY": "0" * 40}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    workdir, said = tmp_path / "my_run", []
    writer = opened(workdir, "wandb", say=said.append)
    for step in (1, 2):
        writer.write(step, {"train/loss": step / 2})
    writer.images(2, "captions", IMAGES, CAPTIONS)
    writer.close()
    writer = opened(workdir, "wandb", keep_until=1, say=said.append)  # step 2 was not saved
    for step in (2, 3):
        writer.write(step, {"train/loss": step / 2})
    writer.close()
    wandb.teardown()  # the files are complete

    assert not said
    rows, keys, ids = wandb_records(workdir / "wandb")
    losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert losses == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert [row[c] for row in rows if (c := "captions/samples.captions") in row] == [CAPTIONS]
    assert len(list(workdir.glob("wandb/offline-run-*/files/media/images/captions/*.png"))) == 2
    assert keys >= {"seed", "data.name"}
    assert list(ids) == [json.loads((workdir / "trackers.json").read_text())["wandb"]]
    written = [path for path in workdir.rglob("*") if path.is_file()]
    assert not [path for path in written if b"hunter2" in path.read_bytes()]
    assert not [path for path in written if b"0" * 40 in path.read_bytes()]


@pytest.mark.slow
def test_mlflow_in_a_local_store(monkeypatch, tmp_path):
    mlflow = pytest.importorskip(
        "mlflow", reason="mlflow is not installed: pip install -e '.[mlflow]'"
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    workdir, said = tmp_path / "my_run", []
    writer = opened(workdir, "mlflow", say=said.append)
    for step in (1, 2):
        writer.write(step, {"train/loss": step / 2, "train/acc": float("nan")})
    writer.images(2, "captions", IMAGES, CAPTIONS)
    writer.close()
    writer = opened(workdir, "mlflow", keep_until=1, say=said.append)
    for step in (2, 3):
        writer.write(step, {"train/loss": step / 2})
    writer.close(failed=True)

    assert not said
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{workdir}/mlflow.db")
    experiment = client.get_experiment_by_name("cap_pretrain")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((workdir / "trackers.json").read_text())["mlflow"]
    assert (run.info.run_name, run.info.status) == ("my_run", "FAILED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 0.5), (2, 1.0), (3, 1.5)]
    assert run.data.params["data.dir"] == "gs://bucket/data"
    folder = next(workdir.glob("mlflow/*/artifacts"))
    assert len(list(folder.glob("captions/00000002/*.png"))) == 2
    captions = (folder / "captions" / "00000002" / "captions.txt").read_text()
    assert captions == "1. a red square\n2. a <b>blue</b> disc\n"
    assert json.loads((folder / "config.json").read_text())["seed"] == 0


def test_only_the_first_process_opens_trackers(fake, tmp_path):
    writer = MetricsWriter(tmp_path / "run", enabled=False, trackers=())
    writer.write(1, {"a": 1.0})
    writer.close()
    assert not fake and not (tmp_path / "run").exists()
