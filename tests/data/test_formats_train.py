"""Training on original layouts: each example once an epoch, on any number of hosts, resumable."""

import json
import subprocess
import sys

import numpy as np
import pytest
from pyarrow import parquet

from cap_pretrain import inputs, train
from cap_pretrain.training import feed
from tests import toy
from tests.data.test_parquet import table
from tests.data.test_webdataset import samples, tar

FILES, EACH = 3, 9


@pytest.fixture(params=["wds", "parquet"])
def name(request, tmp_path):
    """A dataset of 27 examples in three files, which is divided: 25 are trained on."""
    (tmp_path / "files").mkdir()
    for k in range(FILES):
        if request.param == "wds":
            tar(tmp_path / "files" / f"{k:05}.tar", samples(EACH, k * EACH))
        else:
            path = tmp_path / "files" / f"train-{k:05}-of-{FILES:05}.parquet"
            parquet.write_table(table(k * EACH, EACH), path, row_group_size=4)
    return f"{request.param}:{tmp_path / 'files'}"


def make_config(name, tmp_path, **fields):
    known = dict(data__name=name, data__held_out=2, data__block=2, batch_size=8)
    known |= dict(data__cache=str(tmp_path / "cache"), text__vocab_size=30)
    return toy.config(**known | fields)


def test_two_epochs_show_each_example_once_on_any_number_of_hosts(name, tmp_path, tokenizer):
    config = make_config(f"{name}:2+scenes:1", tmp_path)
    mixture = inputs.open_sources(config)
    config = inputs.completed(config, mixture)
    assert (config.data.order, config.data.lanes, config.data.held_out) == ("blocks", 8, 2)
    whole = feed.training_batches(config, mixture, tokenizer)
    steps = 25 * 2 * 3 // (8 * 2)  # two epochs of the first member, which has two thirds
    index = np.concatenate([whole[t]["index"] for t in range(steps)])
    own = index[index < 25]
    counts = np.bincount(own, minlength=25)
    assert counts.max() <= 2 and counts.sum() >= 2 * 24 - 8
    for hosts in (2, 4):
        rows = np.arange(8).reshape(hosts, -1)
        parts = [feed.training_batches(config, mixture, tokenizer, part) for part in rows]
        for t in (0, steps // 2, steps - 1):
            expected = whole[t]
            for key, value in expected.items():
                joined = np.concatenate([part[t][key] for part in parts])
                np.testing.assert_array_equal(joined, value)
    source = mixture[0][0]
    found = {source[int(i)]["captions"][0]: i for i in own}
    assert len(found) == len(set(own.tolist()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parquet"], indirect=True)
def test_a_run_resumes_to_the_same_losses(name, tmp_path):
    for steps, workdir in ((6, "whole"), (3, "cut"), (6, "cut")):
        config = make_config(name, tmp_path, total_steps=steps, optim__decay="constant")
        config.data.workers = 1 if workdir == "whole" else 0
        train.run(config, tmp_path / workdir, allow_changes=["total_steps"])
    losses = toy.losses(tmp_path / "whole")
    assert losses == toy.losses(tmp_path / "cut") and len(losses) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wds"], indirect=True)
def test_the_command_line_trains_on_tars(name, tmp_path):
    options = {"model.name": "mu/8", "data.image_size": 16, "batch_size": 8, "total_steps": 2}
    options |= {"text.length": 16, "text.vocab_size": 30, "data.block": 2, "data.held_out": 2}
    done = subprocess.run(
        [sys.executable, "-m", "cap_pretrain.main", f"--config=configs/pretrain.py:data={name}"]
        + [f"--workdir={tmp_path / 'run'}"]
        + [f"--config.{field}={value}" for field, value in options.items()],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Indexing 3 tars" in done.stdout and "2 of its 27 examples are held out" in done.stdout
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert (stored["order"], stored["lanes"], stored["held_out"]) == ("blocks", 8, 2)
