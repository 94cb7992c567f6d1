"""The program `cap`: its commands, and configs that it finds from any folder."""

import argparse
import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cap_pretrain.cli import config_files
from cap_pretrain.commands import REGISTRY, evaluate, program, train
from cap_pretrain.errors import UserError
from cap_pretrain.sweeps.trials import Trial

ROOT = Path(__file__).parents[2]


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; from cap_pretrain.commands.program import main; assert main(['--help']) == 0; "
        "assert not {'jax', 'numpy', 'ml_collections'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, command in REGISTRY.items():
        assert f"  {name} " in done.stdout and command.purpose in done.stdout


def test_every_module_of_commands_is_registered():
    modules = {path.stem for path in (ROOT / "cap_pretrain/commands").glob("[!_]*.py")}
    assert modules - {"program"} == {command.module for command in REGISTRY.values()}


def test_a_tool_is_the_command_of_its_name():
    for path in (ROOT / "tools").glob("*.py"):
        text = path.read_text()
        if "cap_pretrain.commands" in text:
            assert f"from cap_pretrain.commands.{path.stem} import main" in text
            assert path.stem in {command.module for command in REGISTRY.values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", REGISTRY)
def test_help_of_a_command(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cap"])
    with pytest.raises(SystemExit) as left:
        raise SystemExit(program.main([name, "--help"]))
    assert not left.value.code
    assert "tools/" not in capsys.readouterr().out


def test_a_wrong_command(capsys):
    assert program.main(["captoin"]) == 2
    assert "no command 'captoin'. Did you mean 'caption'?" in capsys.readouterr().err


def test_a_module_name_is_a_command_too(monkeypatch):
    called = []
    module = argparse.Namespace(main=lambda argv: called.append((sys.argv, argv)) or 7)
    monkeypatch.setattr(sys, "argv", ["cap"])
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    assert program.main(["export_encoder", "--out=x"]) == program.main(["export"]) == 7
    assert called[0] == (["cap export_encoder", "--out=x"], ["--out=x"])


@pytest.fixture
def given(monkeypatch):
    """Return the arguments that reach the training program."""
    monkeypatch.setattr(sys, "argv", ["cap"])
    monkeypatch.setattr(train.program, "leave", lambda: None)
    return lambda: sys.argv[1:]


def test_train_takes_a_config_by_position(given):
    train.main(["pretrain:objective=cap", "--workdir=runs/a"])
    assert given() == ["--config=pretrain:objective=cap", "--workdir=runs/a"]
    train.main(["--config=x.py", "--dry_run"])
    assert given() == ["--config=x.py", "--dry_run"]


def test_train_on_photos_builds_a_dataset_first(given, monkeypatch):
    monkeypatch.setattr("cap_pretrain.cli.own_data.prepare", lambda argv: ["--config=x", argv[2]])
    train.main(["photos", "captions.csv", "--workdir=a"])
    assert given() == ["--config=x", "--workdir=a"]


@pytest.mark.parametrize(
    ("run", "workdir"),
    [
        ("runs/a", "runs/a_evaluated"),
        ("runs/a/checkpoints/30", "runs/a_30_evaluated"),
        ("gs://b/a/checkpoints/30", "gs://b/a_30_evaluated"),
    ],
)
def test_evaluate_is_a_run_without_steps(run, workdir, given):
    evaluate.main([run, "--evals=knn+loss", "--config.evals.knn.k=3"])
    config = config_files.shipped() / "evaluate.py"
    wanted = [f"--config={config}:evals=knn+loss", f"--workdir={workdir}"]
    assert given() == [*wanted, f"--config.encoder={run}", "--config.evals.knn.k=3"]


@pytest.mark.parametrize("name", ["pretrain", "configs/pretrain.py", "configs/pretrain"])
def test_configs_are_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find(name).samefile(ROOT / "configs/pretrain.py")
    own = tmp_path / "configs/pretrain.py"
    own.parent.mkdir()
    own.write_text("")
    assert config_files.find(name).samefile(own), "the current folder comes first"


@pytest.mark.parametrize("name", ["evaluate", "scaling"])
def test_a_name_is_no_file_of_the_current_folder(name, tmp_path, monkeypatch):
    (tmp_path / f"{name}.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    folder = config_files.SWEEPS if name == "scaling" else config_files.FOLDER
    assert config_files.find(name, folder).parent.samefile(ROOT / folder)
    assert config_files.find(f"./{name}").samefile(f"{name}.py")


def test_sweeps_and_their_trials_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find("scaling", config_files.SWEEPS).name == "scaling.py"
    assert Trial("a", "configs/quickstart.py", {"seed": 3}).resolved().seed == 3


@pytest.mark.parametrize("name", ["pretrian", "configs/pretrian.py", "", "/configs/pretrain.py"])
def test_a_config_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no file"):
        config_files.find(name)


def test_what_a_config_says_is_read_without_running_it(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        '"""Do it.\n\nArguments:\n  a   one\n      thing\n  bc  two\n\nMore.\n"""\n1 / 0\n'
    )
    found = config_files.described(path)
    assert found.purpose == "Do it." and found.arguments == [("a", "one thing"), ("bc", "two")]


def test_the_list_of_configs_has_every_config_and_argument(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert program.main(["configs"]) == 0
    out = capsys.readouterr().out
    for path in (ROOT / "configs").rglob("*.py"):
        assert f"  {path.stem}: " in out
    assert "objective  cappa, cap, locca" in out and "batches  batch sizes" in out
    assert program.main(["configs", "scaling"]) == 0
    assert "scaling laws" in capsys.readouterr().out


@pytest.mark.slow
def test_a_wheel_has_the_configs_and_the_program(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    folder = tmp_path / "sources"
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in files:
        if name.startswith(("cap_pretrain/", "configs/", "pyproject", "setup", "README")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    subprocess.run([*command, "-q", "-w", str(tmp_path)], cwd=folder, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        for path in (ROOT / "configs").rglob("*.py"):
            assert f"cap_pretrain/configs/{path.relative_to(ROOT / 'configs')}" in names
        points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "cap = cap_pretrain.commands.program:main" in wheel.read(points).decode()
