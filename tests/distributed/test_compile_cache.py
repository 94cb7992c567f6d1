"""Where compiled programs are kept, and that a second start finds the training step there."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib

import jax
import pytest

from cap_pretrain.cli import processes
from cap_pretrain.distributed import compile_cache
from cap_pretrain.training.changes import check_unchanged
from tests import toy


@pytest.fixture
def chosen(monkeypatch):
    """`use` on a machine with GPUs and no settings of the user; returns (folder, lines)."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def use(setting, workdir):
        lines = []
        jax.config.update("jax_compilation_cache_dir", None)
        compile_cache.use(setting, workdir, lines.append)
        return jax.config.jax_compilation_cache_dir, lines

    yield use
    jax.config.update("jax_compilation_cache_dir", before)


def test_it_lies_beside_the_workdir_and_may_be_named_or_off(chosen, tmp_path, monkeypatch):
    folder = tmp_path / compile_cache.FOLDER
    for _ in range(2):
        assert chosen("auto", tmp_path / "run") == (
            str(folder),
            [f"Compiled programs are kept in {folder}."],
        )
    monkeypatch.chdir(tmp_path)
    assert chosen("auto", tmp_path.joinpath("run").relative_to(tmp_path))[0] == str(folder)
    named = tmp_path / "a" / "b"
    assert chosen(str(named), tmp_path / "run")[0] == str(named) and named.is_dir()
    assert chosen("gs://bucket/compiled", tmp_path / "run")[0] == "gs://bucket/compiled"
    for off in compile_cache.OFF:
        assert chosen(off, tmp_path / "run") == (None, [])


def test_cpus_use_a_named_folder_only(chosen, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert chosen("auto", tmp_path / "run") == (None, [])
    assert not list(tmp_path.iterdir())
    assert chosen(str(tmp_path / "named"), tmp_path / "run")[0] == str(tmp_path / "named")


def test_settings_of_jax_come_first(chosen, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the user's way to have none
    assert chosen("auto", tmp_path / "run") == (None, [])
    folder, (line,) = chosen(str(tmp_path / "other"), tmp_path / "run")
    assert folder is None and "JAX's own setting" in line
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    compile_cache.use("auto", tmp_path / "run", pytest.fail)
    assert jax.config.jax_compilation_cache_dir == "/elsewhere"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_others_may_write_to_is_used_only_if_named(chosen, tmp_path, monkeypatch):
    folder = tmp_path / compile_cache.FOLDER
    folder.mkdir()
    folder.chmod(0o777)
    found, (line,) = chosen("auto", tmp_path / "run")
    assert found is None and f"--config.compile_cache={folder}" in line
    assert chosen(str(folder), tmp_path / "run")[0] == str(folder)
    folder.chmod(0o755)
    assert chosen("auto", tmp_path / "run")[0] == str(folder)
    with monkeypatch.context() as context:
        context.setattr(os, "geteuid", lambda: 12345)
        assert chosen("auto", tmp_path / "run")[0] is None
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert chosen("auto", tmp_path / "run")[0] is None


def test_a_folder_that_cannot_be_written_costs_a_line(chosen, tmp_path):
    (tmp_path / compile_cache.FOLDER).touch()  # also root cannot make a folder here
    found, (line,) = chosen("auto", tmp_path / "run")
    assert found is None and line.startswith("compile_cache: cannot write to")
    assert len(line.splitlines()) == 1


def test_unfinished_and_old_entries_are_removed(chosen, tmp_path, monkeypatch):
    folder = tmp_path / compile_cache.FOLDER
    folder.mkdir(mode=0o755)
    whole = zlib.compress(os.urandom(1000))
    contents = {"new": whole, "cut": whole[:500], "old": whole, "oldest": whole, "empty": b""}
    for age, (name, content) in enumerate(contents.items()):
        path = folder / f"{name}-cache"
        path.write_bytes(content)
        os.utime(path, (time.time() - age,) * 2)
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 2 * len(whole))
    lines = chosen("auto", tmp_path / "run")[1]
    assert {path.name for path in folder.iterdir()} == {"new-cache", "old-cache"}
    assert [bool(re.search("cut-cache|empty-cache", line)) for line in lines] == [True, True, False]


def test_it_may_change_between_two_starts(tmp_path):
    path = tmp_path / "config.json"
    c = toy.config()
    stored = {k: v for k, v in c.to_dict().items() if k != "compile_cache"}  # an earlier version
    path.write_text(json.dumps(stored))
    c.compile_cache = "/somewhere/else"
    assert check_unchanged(c, path) == []


SMALL = {
    **{"batch_size": 8, "data.image_size": 16, "text.length": 16, "text.vocab_size": 100},
    **{"data.scenes.length_train": 200, "data.scenes.length_val": 20, "total_steps": 4},
    **{"log.every_steps": 1, "checkpoint.every_steps": 2, "eval.every_share": 0.0},
}


def start(workdir, hosts=1, **fields):
    """Run the program on `hosts` processes without JAX's settings; return what they print."""
    fields = SMALL | fields
    command = [sys.executable, "-m", "cap_pretrain.main", f"--workdir={workdir}"]
    command += [f"--config={toy.CONFIGS / 'pretrain.py'}:objective=cap,model=mu/8"]
    command += [f"--config.{name}={value}" for name, value in fields.items()]
    address = processes._free_address()
    logs = [workdir.with_name(f"{workdir.name}.{host}.log") for host in range(hosts)]
    running = []
    for host, log in enumerate(logs):
        environment = processes.environment(address, hosts, host)
        environment = {k: v for k, v in environment.items() if "CACHE" not in k}
        environment |= {"JAX_LOG_COMPILES": "1", "XLA_FLAGS": ""}
        with log.open("w") as output:
            pipes = {"stdout": output, "stderr": subprocess.STDOUT}
            running.append(subprocess.Popen(command, env=environment, **pipes))
    codes = [process.wait(timeout=240) for process in running]
    assert codes == [0] * hosts, logs[0].read_text()
    return [log.read_text() for log in logs]


def hit(printed: str) -> bool:
    assert "Compiling jit(train_step)" in printed  # so JAX's words are still these
    return "Persistent compilation cache hit for 'jit_train_step'" in printed


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_restart_does_not_compile_the_step(hosts, tmp_path):
    fields = {"compile_cache": tmp_path / "compiled"}
    first = start(tmp_path / "run", hosts, **fields)
    assert not any(hit(printed) for printed in first)
    assert len(list((tmp_path / "compiled").glob("jit_train_step-*-cache"))) == 1
    logged = toy.losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    second = start(tmp_path / "run", hosts, **fields)
    assert "Resuming from step 2." in second[0]
    assert all(hit(printed) for printed in second)
    assert toy.losses(tmp_path / "run") == logged


@pytest.mark.slow
def test_a_damaged_entry_costs_a_compilation(tmp_path):
    fields = {"compile_cache": tmp_path / "compiled", "total_steps": 1}
    start(tmp_path / "first", **fields)
    (path,) = (tmp_path / "compiled").glob("jit_train_step-*-cache")
    data = path.read_bytes()
    # Whole by its checksum, but no program.
    path.write_bytes(zlib.compress(b"\0" * 4 + os.urandom(len(data))))
    (printed,) = start(tmp_path / "second", **fields)
    assert not hit(printed) and "Error reading persistent compilation cache" in printed
    path.write_bytes(data[: len(data) // 2])
    (printed,) = start(tmp_path / "third", **fields)
    assert not hit(printed) and f"removed {path}, which is not whole" in printed
    assert len(zlib.decompress(path.read_bytes())) > len(data)


@pytest.mark.slow
def test_nothing_is_kept_on_cpus_by_default(tmp_path):
    start(tmp_path / "run", total_steps=1)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.0.log"}
