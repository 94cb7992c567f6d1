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

from cap_pretrain import files
from cap_pretrain.cli import processes
from cap_pretrain.distributed import compile_cache
from cap_pretrain.training.changes import check_unchanged
from tests import toy


@pytest.fixture
def chosen(monkeypatch):
    """`use` on a machine with GPUs and no settings of the user; returns (folder, lines)."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(compile_cache, "_make_keys_lasting", lambda config: None)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def use(setting, workdir):
        lines = []
        jax.config.update("jax_compilation_cache_dir", None)
        compile_cache.use(toy.config(compile_cache=setting), workdir, lines.append)
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
    kept, (line,) = chosen("auto", files.place("gs://bucket/run"))
    assert kept is None and "--config.compile_cache=gs://BUCKET/compiled" in line
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
    compile_cache.use(toy.config(), tmp_path / "run", pytest.fail)
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


PARTITIONED = """
import sys
import jax, jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec as P
from cap_pretrain.distributed import compile_cache
from tests import toy

scale, lasting, depth = float(sys.argv[1]), sys.argv[2] == "lasting", int(sys.argv[3])
f = custom_partitioning(lambda x: scale * x)
def partition(mesh, args, result):
    return mesh, lambda x: scale * x, args[0].sharding, (args[0].sharding,)
f.def_partition(partition=partition, sharding_rule="i -> i")
if lasting:
    compile_cache._make_keys_lasting(toy.config(model__depth=depth))
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
x = jax.device_put(jnp.ones(2), NamedSharding(mesh, P("data")))
print(float(jax.jit(lambda x: f(x) + 1)(x)[0]))
"""


def partitioned(folder, scale, lasting="lasting", depth=1):
    """Run a program with a custom partitioning; return its result and the number of entries."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", PARTITIONED, str(scale), lasting, str(depth)],
        env=processes.environment()
        | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout), len(list(folder.glob("jit__lambda*-cache")))


@pytest.mark.slow
def test_keys_do_not_depend_on_addresses_but_on_the_model(tmp_path):
    """On several GPUs, the attention of cuDNN is partitioned in this way."""
    assert [partitioned(tmp_path / "a", 2, "as it is")[1] for _ in range(2)] == [1, 2]
    assert [partitioned(tmp_path / "b", 2) for _ in range(2)] == [(3.0, 1)] * 2
    # The scale is in the callback only: another model must not find the program of this one.
    assert partitioned(tmp_path / "b", 5, depth=2) == (6.0, 2)


SMALL = {
    **{"batch_size": 8, "data.image_size": 16, "text.length": 16, "text.vocab_size": 100},
    **{"data.scenes.length_train": 200, "data.scenes.length_val": 20, "total_steps": 4},
    **{"log.every_steps": 1, "checkpoint.every_steps": 2, "eval.every_share": 0.0},
}


def ended(running):
    """Wait for processes; return their exit codes. None outlasts a failure."""
    try:
        return [process.wait(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()


def start(workdir, hosts=1, **fields):
    """Run the program on `hosts` processes without JAX's settings; return what they print."""
    fields = SMALL | fields
    command = [sys.executable, "-m", "cap_pretrain.main", f"--workdir={workdir}"]
    command += [f"--config={toy.CONFIGS / 'pretrain.py'}:objective=clip,model=mu/8"]
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
    codes = ended(running)
    assert codes == [0] * hosts, logs[0].read_text()
    return [log.read_text() for log in logs]


def hit(printed: str) -> bool:
    assert "Compiling jit(train_step)" in printed  # so JAX's words are still these
    return "Persistent compilation cache hit for 'jit_train_step'" in printed


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_restart_does_not_compile_the_step(hosts, tmp_path):
    def start_again():
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
        printed = start(tmp_path / "run", hosts, compile_cache=tmp_path / "compiled")[0]
        assert "Resuming from step 2." in printed and toy.losses(tmp_path / "run") == logged
        return printed

    first = start(tmp_path / "run", hosts, compile_cache=tmp_path / "compiled")
    assert not any(hit(printed) for printed in first)
    (path,) = (tmp_path / "compiled").glob("jit_train_step-*-cache")  # host 0 alone writes
    logged = toy.losses(tmp_path / "run")
    # Only on CPUs do the other hosts have keys of their own: JAX hashes which devices are local.
    printed = start_again()
    assert hit(printed)
    assert ("Compiling jit(send)" in printed) == (hosts > 1)  # restored by checkpoints/replicas.py
    if hosts == 1:  # an entry that is whole by its checksum, but no program
        path.write_bytes(zlib.compress(b"\0" * 4 + os.urandom(path.stat().st_size)))
        printed = start_again()
        assert not hit(printed) and "Error reading persistent compilation cache" in printed


@pytest.mark.slow
def test_nothing_is_kept_on_cpus_by_default(tmp_path):
    start(tmp_path / "run", total_steps=1)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.0.log"}
