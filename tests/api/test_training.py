"""`cap_pretrain.train` does what the command line does; configs by name, overrides by field."""

import pytest

import cap_pretrain
from cap_pretrain import train
from cap_pretrain.api.training import changed, named
from cap_pretrain.errors import UserError
from tests import quick, toy


def test_configs_are_named_and_changed():
    config = named("pretrain:objective=siglip,model=mu/8")
    assert config.learner.contrast == "sigmoid" and config.model.name == "mu/8"
    fresh = changed(config, {"optim.lr": 1, "total_steps": 3, "evals.val.limit": 8})
    assert (fresh.optim.lr, fresh.total_steps, fresh.evals.val.limit) == (1.0, 3, 8)
    assert config.total_steps == 366_500 and fresh.is_locked
    assert named(str(toy.CONFIGS / "quickstart.py")).total_steps == 5000
    for call, message in (
        (
            lambda: named("pretrian"),
            "there is no file 'pretrian'. Did you mean 'configs/pretrain.py'",
        ),
        (lambda: named("pretrain:objectiv=cap"), "no argument 'objectiv'"),
        (lambda: named("quickstart:a=b"), "'quickstart:a=b' does not fit quickstart.py"),
        (lambda: changed(config, {"optim.learning": 1}), "no field 'optim.learning'"),
        (lambda: changed(config, {"total_steps": "ten"}), "total_steps must be of type int, found"),
        (lambda: cap_pretrain.train(config, "s3://a/b"), "workdir: s3://a/b is a URL"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(TypeError, match="config: found a int"):
        cap_pretrain.train(3, "runs/a")
    assert cap_pretrain.train is train and callable(train)  # a module that can be called


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
