"""`cap_pretrain.train` does what the command line does; configs by name, overrides by field."""

from pathlib import Path

import pytest

import cap_pretrain
from cap_pretrain import train
from cap_pretrain.api import training
from cap_pretrain.api.training import changed
from cap_pretrain.cli import config_files
from cap_pretrain.errors import UserError
from tests import quick, toy


def test_configs_are_named_and_changed():
    config = config_files.config("pretrain:objective=siglip,model=mu/8")
    assert config.learner.contrast == "sigmoid" and config.model.name == "mu/8"
    fresh = changed(config, {"optim.lr": 1, "total_steps": 3, "evals.val.limit": 8})
    assert (fresh.optim.lr, fresh.total_steps, fresh.evals.val.limit) == (1.0, 3, 8)
    assert config.total_steps == 366_500 and fresh.is_locked
    assert config_files.config(str(toy.CONFIGS / "quickstart.py")).total_steps == 5000
    for call, message in (
        (
            lambda: config_files.config("pretrian"),
            "there is no file 'pretrian'. Did you mean 'configs/pretrain.py'",
        ),
        (lambda: config_files.config("pretrain:objectiv=cap"), "no argument 'objectiv'"),
        (
            lambda: config_files.config("quickstart:a=b"),
            "'quickstart:a=b' does not fit quickstart.py",
        ),
        (lambda: changed(config, {"optim.learning": 1}), "no field 'optim.learning'"),
        (lambda: changed(config, {"total_steps": "ten"}), "total_steps must be of type int, found"),
        (
            lambda: cap_pretrain.train(config, "s3://a/b"),
            "workdir: s3://a/b: a run cannot be there: Orbax",
        ),
    ):
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(TypeError, match="config: found a int"):
        cap_pretrain.train(3, "runs/a")
    assert cap_pretrain.train is train and callable(train)  # a module that can be called


def test_a_mistake_within_a_config_file_keeps_its_traceback(tmp_path):
    (tmp_path / "own.py").write_text("def get_config(arg=None):\n    return len(3)\n")
    with pytest.raises(TypeError, match="has no len"):
        config_files.config(f"{tmp_path / 'own.py'}:a=b")


def test_the_workdir_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    places = []
    monkeypatch.setattr(training, "run", lambda config, workdir, *_: places.append(workdir))
    done = cap_pretrain.train("quickstart", "~/runs/x")
    assert places == [tmp_path / "runs/x"] and Path(done.workdir) == places[0]


@pytest.mark.slow
def test_training_returns_its_metrics_and_resumes(tmp_path, capsys):
    config = toy.config(quick.NAME, text__length=8)
    done = cap_pretrain.train(config, tmp_path / "run", {"total_steps": 3})
    assert done.step == 3 and config.total_steps == 2
    assert done.metrics["train/loss"] == toy.lines(tmp_path / "run")[-1]["train/loss"]
    assert done.load().methods == ("embed",)
    capsys.readouterr()
    again = cap_pretrain.train(config, str(tmp_path / "run"), {"total_steps": 3})
    assert again.metrics == done.metrics and "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="batch_size"):
        cap_pretrain.train(config, tmp_path / "other", {"batch_size": 0})
