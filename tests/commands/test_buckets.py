"""Tests of commands with runs in a bucket, by URL."""

import argparse
import importlib
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import cap_pretrain
from cap_pretrain import evals, files
from cap_pretrain.cli import arguments
from cap_pretrain.commands import (
    caption,
    compare_runs,
    export_encoder,
    report,
    results_table,
    sweep,
)
from cap_pretrain.sweeps import trials
from tests import toy

RUN, JUDGED, EXPORT = (f"gs://bucket/{name}" for name in ("runs/a", "runs/judged", "exports/a"))


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("colorize", ["--checkpoint=a", "--out=gs://b/a.png"]),
        ("embed", ["a", "b.jpg", "--out=gs://b/a.npz"]),
        ("search", ["gs://b/a.npz", "--text=a dog"]),
        ("extract_features", ["--encoder=a", "--data=b", "--what=pooled", "--out=gs://b/a"]),
        ("train_tokenizer", ["--data=a", "--out=gs://b/a"]),
        ("contact_sheet", ["--data=scenes", "--out=gs://b/a.png"]),
        ("sweep", ["plot", "gs://b/a", "--y=val/loss", "--out=gs://b/a.png"]),
        ("sweep", ["status", "s3://b/a"]),
        ("report", ["hf://b/a", "--out=a.html"]),
    ],
)
def test_a_url_where_none_can_be_is_refused(command, given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"cap_pretrain.commands.{command}")
    with pytest.raises(SystemExit) as stopped:
        module.main(given)
    last = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and "://b/a" in last, last
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_commands_take_a_run_in_a_bucket(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(photo)
    small = {"model__depth": 1, "model__decoder_depth": 1}
    evaluators = ConfigDict({"val": evals.defaults("loss", limit=8)})
    config = toy.config("captioner", evals=evaluators, **small)
    cap_pretrain.train(config, RUN)

    def printed(command, *given):
        capsys.readouterr()
        assert command.main([*map(str, given)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    model = cap_pretrain.load(RUN)
    assert printed(caption, "--checkpoint", RUN, photo) == f"{photo}: {model.caption(photo)[0]}\n"

    given = {"encoder": f"{RUN}/checkpoints/2", "evals.loss.limit": 8}
    judged = cap_pretrain.train("evaluate:evals=loss", JUDGED, given)
    figures = ("--figures", "val/loss", "loss/loss")
    table = printed(results_table, "gs://bucket/runs", *figures)
    assert f"{judged.metrics['loss/loss']:.4g}" in table and table.count("\n") == 4

    assert printed(export_encoder, "--checkpoint", RUN, "--out", EXPORT).startswith("wrote gs://")
    written = bucket.names("bucket/exports/a/")
    assert {"config.json", "model.safetensors", "README.md"} <= set(written)
    assert export_encoder.main(["--checkpoint", RUN, "--out", EXPORT]) == 2
    assert "already exists" in capsys.readouterr().err
    encoder = cap_pretrain.load(EXPORT)
    np.testing.assert_allclose(encoder.embed(photo), model.embed(photo, what="pooled"), atol=1e-5)

    assert "the same: " in printed(compare_runs, RUN, f"{RUN}/")
    printed(report, RUN, JUDGED, "--out", "gs://bucket/page.html")
    assert b"judged" in bucket.objects["bucket/page.html"].data
    assert not (tmp_path / "gs:").exists()


def test_a_command_says_by_its_status_that_a_bucket_is_out_of_reach(capsys):
    def command(args):
        raise OSError(args.code, "reason", args.file)

    for code, file, status in ((5, "gs://b/a", 75), (5, "/a", 2), (13, "gs://b/a", 2)):
        args = argparse.Namespace(code=code, file=file)
        assert arguments.run(command, args) == status and file in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_in_a_bucket(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = "gs://bucket/sweep"
    (tmp_path / "tiny.py").write_text(
        "from tests import toy\n\n\ndef get_config():\n"
        "    return toy.config('rotation', model__depth=1)\n"
    )
    (tmp_path / "sweep.py").write_text(
        "from cap_pretrain.sweeps.trials import Trial\n\n\ndef sweep(arg=None):\n"
        "    yield Trial('a', 'tiny.py', {'seed': 1})\n"
    )
    log = files.local_folder(files.place(folder)) / "a" / trials.LOG_FILE
    log.parent.mkdir(parents=True)
    log.write_text("of a runner that was killed\n")
    given = ["run", "sweep.py", "--out", folder, "--retries", "0"]
    assert sweep.main(given) == 0, bucket.objects["bucket/sweep/a/log.txt"].data.decode()
    assert json.loads(bucket.objects["bucket/sweep/a/trial.json"].data)["state"] == "finished"
    copied = bucket.objects["bucket/sweep/a/log.txt"].data
    assert copied.startswith(b"of a runner that was killed\n") and b"step" in copied
    assert sweep.main(given) == 0
    assert "1 of 1 trials are finished already" in capsys.readouterr().out
    assert sweep.main(["status", folder]) == 0 and "1 finished" in capsys.readouterr().out
    assert sweep.main(["table", folder, "--figures", "train/loss"]) == 0
    assert not (tmp_path / "gs:").exists()
