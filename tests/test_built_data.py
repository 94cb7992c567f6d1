"""From files as people have them to a run: build a dataset, train on it, judge on it."""

import json

import pytest
from ml_collections import ConfigDict

from cap_pretrain import evals, train
from tests import toy
from tests.data.test_question_formats import build
from tests.data.test_webdataset import samples, tar
from tests.tools.test_build_dataset import jpeg, write_files

SIZES = {"train": {"cat": 12, "dog": 7, "emu": 2}, "val": {"cat": 2, "dog": 3, "emu": 4}}


def openimages(tmp_path):
    """A dataset whose classes differ in size."""
    arguments = {"--labels": [], "--images": []}
    names = {name: f"/m/0{name}" for name in SIZES["train"]}
    for split, sizes in SIZES.items():
        own = [name for name, size in sizes.items() for _ in range(size)]
        lines = [f"{k:016x},verification,{names[name]},1" for k, name in enumerate(own)]
        labels = tmp_path / f"{split}.csv"
        labels.write_text("\n".join(["ImageID,Source,LabelName,Confidence", *lines]) + "\n")
        photos = {f"{k:016x}.jpg": jpeg(k) for k in range(len(own))}
        arguments["--labels"].append(f"{split}={labels}")
        arguments["--images"].append(f"{split}={write_files(tmp_path / split, photos)}")
    (tmp_path / "classes.csv").write_text("".join(f"{m},{name}\n" for name, m in names.items()))
    flat = [a for flag, values in arguments.items() for a in (flag, *values)]
    return build(tmp_path, "openimages", *flat, "--classes", tmp_path / "classes.csv")


@pytest.mark.slow
def test_learner_and_evaluators_see_the_same_classes(tmp_path, capsys):
    c = toy.config("classifier", data__class_min=5, data__class_max=10)
    c.data.name = str(openimages(tmp_path))
    probes = {
        name: evals.defaults(name, when="end") for name in ("accuracy", "linear_probe", "knn")
    }
    c.evals = ConfigDict(probes)
    train.run(c, tmp_path / "run")
    told = capsys.readouterr().out
    assert "2 of 3 classes, 1 at the cap of 10 (seed 0): 17 examples." in told
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["learner"]["classes"] == 2
    for name in c.evals:
        result = json.loads((tmp_path / "run" / "evals" / name / "2.json").read_text())
        assert result["images"] == 5, "the emus are left out"
        if name != "accuracy":
            assert (result["classes"], result["train_split"]) == (2, "train")


@pytest.mark.slow
def test_tars_are_trained_on(tmp_path):
    tar(tmp_path / "shards" / "00000.tar", samples(8))
    c = toy.config(text__vocab_size=30)
    c.data.name = str(build(tmp_path, "webdataset", "--shards", tmp_path / "shards"))
    train.run(c, tmp_path / "run")
    assert [line["step"] for line in toy.losses(tmp_path / "run")] == [1, 2]
