"""Checkpoints hold the whole state, detect corruption, and refuse another model."""

import contextlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cap_pretrain import files
from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.checkpoints.folders import saved_steps
from cap_pretrain.checkpoints.manifest import CorruptCheckpointError
from cap_pretrain.checkpoints.stored import load_arrays
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.training.step import TrainState
from tests import toy


def make_state(step=3, width=4, ema=True, names=("kernel",), seed=0):
    mesh = sharding.make_mesh(toy.config())
    rng = np.random.default_rng(seed)

    def array(*shape, dtype=np.float32):
        values = rng.normal(size=shape).astype(dtype)
        return jax.device_put(values, NamedSharding(mesh, P()))

    params = {"encoder": {name: array(3, width) for name in names}}
    return TrainState(
        step=jax.device_put(np.int32(step), NamedSharding(mesh, P())),
        params=params,
        stats={"norm": {"mean": array(width)}},
        opt_state=({"mu": array(3, width, dtype=jax.numpy.bfloat16), "none": ()},),
        counts={"broken": jax.device_put(np.int32(1), NamedSharding(mesh, P()))},
        ema={"encoder": {name: array(3, width) for name in names}} if ema else None,
    )


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def saved(workdir, *states, **fields):
    checkpoints = Checkpoints(workdir, toy.config(**fields))
    for state in states:
        checkpoints.save(state)
    checkpoints.close()


def opened(workdir, read_only=True):
    return contextlib.closing(Checkpoints(workdir, toy.config(), read_only=read_only))


@pytest.mark.parametrize("ema", [True, False])
def test_everything_comes_back_bit_by_bit(ema, tmp_path):
    state = make_state(ema=ema)
    saved(tmp_path, state)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
        toy.assert_same(checkpoints.restore(abstract(state), 3), state)


def test_there_is_none_at_first(tmp_path):
    with opened(tmp_path, read_only=False) as checkpoints:
        assert checkpoints.latest_step() is None


def test_keeps_the_last_and_every_nth(tmp_path):
    fields = {"checkpoint__keep_last": 2, "checkpoint__keep_every_steps": 4}
    saved(tmp_path, *(make_state(step) for step in (2, 4, 6, 8, 10)), **fields)
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [4, 8, 10]


@pytest.mark.parametrize(
    "other",
    [dict(width=5), dict(names=("kernel", "bias")), dict(names=("weight",))],
    ids=["shape", "more", "renamed"],
)
def test_a_checkpoint_of_another_model_is_refused(other, tmp_path):
    saved(tmp_path, make_state())
    message = "checkpoints/3: holds another model"
    with opened(tmp_path) as checkpoints, pytest.raises(UserError, match=message) as error:
        checkpoints.restore(abstract(make_state(**other)), 3)
    assert len(str(error.value).splitlines()) == 2


def test_an_interrupted_save_does_not_count(tmp_path):
    saved(tmp_path, make_state(2))
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    (half / "learner").mkdir(parents=True)
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 2
    with opened(tmp_path, read_only=False) as checkpoints:
        assert checkpoints.latest_step() == 2
        checkpoints.save(make_state(4))
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 4
    assert not half.exists()


def data_files(folder):
    """Return the files of a checkpoint that hold arrays."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and "/d/" in str(p))


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def edit_manifest(folder, old, new):
    path = folder / "manifest" / "metadata"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def swap_optimizer(folder):
    """Replace the optimizer with that of step 2, which is valid but of another step."""
    shutil.rmtree(folder / "optimizer")
    shutil.copytree(folder.parent / "2" / "optimizer", folder / "optimizer")


CORRUPTIONS = {
    "empty folder": empty,
    "a file instead": lambda f: (shutil.rmtree(f / "learner"), (f / "learner").write_text("x")),
    "no manifest": lambda f: shutil.rmtree(f / "manifest"),
    "manifest torn": lambda f: (f / "manifest" / "metadata").write_text('{"step": 4, "lea'),
    "manifest changed": lambda f: edit_manifest(f, '"float32"', '"float16"'),
    "manifest of another step": lambda f: shutil.copytree(
        f.parent / "2" / "manifest", f / "manifest", dirs_exist_ok=True
    ),
    "no learner": lambda f: shutil.rmtree(f / "learner"),
    "no optimizer": lambda f: shutil.rmtree(f / "optimizer"),
    "optimizer of another step": swap_optimizer,
    "no database index": lambda f: (f / "learner" / "manifest.ocdbt").unlink(),
    "index flipped": lambda f: flip(f / "learner" / "manifest.ocdbt"),
    "tree metadata torn": lambda f: (f / "optimizer" / "_METADATA").write_text("{"),
    "no data": lambda f: [p.unlink() for p in data_files(f)],
    "data truncated": lambda f: [p.write_bytes(p.read_bytes()[:-7]) for p in data_files(f)],
    "data emptied": lambda f: [p.write_bytes(b"") for p in data_files(f)],
    "data flipped early": lambda f: [flip(p, 0.2) for p in data_files(f)],
    "data flipped late": lambda f: [flip(p, 0.8) for p in data_files(f)],
    "renamed": lambda f: (shutil.rmtree(f), shutil.copytree(f.parent / "2", f)),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupt_checkpoint_falls_back_to_the_one_before(corruption, tmp_path, capfd):
    older, newer = make_state(2), make_state(4, seed=1)
    saved(tmp_path, older, newer)
    CORRUPTIONS[corruption](tmp_path / "checkpoints" / "4")
    messages = []
    with opened(tmp_path, read_only=False) as checkpoints:
        found = checkpoints.restore_newest(abstract(newer), messages.append)
        toy.assert_same(found, older)
        assert len(messages) == 1 and "checkpoints/4: is corrupt (" in messages[0]
        assert len(messages[0].splitlines()) == 1
        checkpoints.save(newer)  # the run reaches this step again
    assert saved_steps(tmp_path) == [2, 4]
    assert (tmp_path / "checkpoints" / "4.damaged").is_dir()
    with opened(tmp_path) as checkpoints:
        toy.assert_same(checkpoints.restore_newest(abstract(newer), messages.append), newer)
    assert len(messages) == 1 and "Traceback" not in "".join(capfd.readouterr())


def test_any_flipped_bit_is_noticed_or_does_not_matter(tmp_path):
    """Flip one bit of each file in turn: restoring gives the saved state or raises."""
    state = make_state(4)
    saved(tmp_path, state)
    folder = tmp_path / "checkpoints" / "4"
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    rng = np.random.default_rng(0)
    noticed = 0
    for path in files:
        content = path.read_bytes()
        flip(path, rng.random())
        with opened(tmp_path) as checkpoints:
            try:
                toy.assert_same(checkpoints.restore(abstract(state), 4), state)
            except CorruptCheckpointError:
                noticed += 1
        path.write_bytes(content)
    assert len(files) > 10 and noticed > 4


def test_links_to_checkpoints_are_read_and_left_alone(tmp_path):
    saved(tmp_path / "other", make_state(2))
    link = tmp_path / "run" / "checkpoints" / "2"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "other" / "checkpoints" / "2")
    with opened(tmp_path / "run", read_only=False) as checkpoints:
        toy.assert_same(checkpoints.restore_newest(abstract(make_state(2))), make_state(2))
        for step in (4, 6, 8):
            checkpoints.save(make_state(step))
    assert saved_steps(tmp_path / "run") == [2, 6, 8] and link.is_symlink()
    assert saved_steps(tmp_path / "other") == [2]


def test_names_that_are_nearly_numbers_are_not_checkpoints(tmp_path):
    """Every name made of these parts, except "7" itself, is left as it is."""
    saved(tmp_path, make_state(2), make_state(4))
    folder = tmp_path / "checkpoints"
    before, after = (
        ("", "0", "+", "-", " ", "_", "٣", "７", "1e"),
        ("", " ", "\n", ".0", "３", "~", "_"),
    )
    names = {a + "7" + b for a in before for b in after} - {"7"} | {"9" * 30}
    for name in names:
        (folder / name).mkdir()
    with opened(tmp_path, read_only=False) as checkpoints:
        assert checkpoints.restore_newest(abstract(make_state()), pytest.fail).step == 4
        for step in (6, 8, 10):
            checkpoints.save(make_state(step))
    assert {p.name for p in folder.iterdir()} == names | {"8", "10"}


def test_something_else_under_the_name_of_a_checkpoint_is_told_at_once(tmp_path):
    saved(tmp_path, make_state(2))
    (tmp_path / "checkpoints" / "4").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="checkpoints/4: is a link to nothing"):
        Checkpoints(tmp_path, toy.config())


def test_a_damaged_checkpoint_is_never_replaced(tmp_path):
    for _ in range(2):
        saved(tmp_path, make_state(4))
        folder = tmp_path / "checkpoints" / "4"
        (folder / "manifest" / "metadata").unlink()
        with opened(tmp_path, read_only=False) as checkpoints, pytest.raises(UserError):
            checkpoints.restore_newest(abstract(make_state()), lambda _: None)
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"4.damaged", "4.2.damaged"}


def test_without_a_valid_checkpoint_nothing_starts_over(tmp_path):
    saved(tmp_path, make_state(2), make_state(4))
    for step in (2, 4):
        (tmp_path / "checkpoints" / str(step) / "manifest" / "metadata").unlink()
    message = "every checkpoint is corrupt, from 2 to 4"
    with (
        opened(tmp_path, read_only=False) as checkpoints,
        pytest.raises(UserError, match=message),
    ):
        checkpoints.restore_newest(abstract(make_state()), lambda _: None)
    assert (tmp_path / "checkpoints" / "2.damaged").is_dir()


def test_a_checkpoint_is_bound_to_its_tokenizer(tmp_path):
    def opened_with(tokenizer):
        identity = {"t.model": tokenizer}
        return contextlib.closing(Checkpoints(tmp_path, toy.config(), identity=identity))

    with opened_with("abc") as checkpoints:
        checkpoints.save(make_state())
    with opened_with("abc") as checkpoints:
        assert checkpoints.restore_newest(abstract(make_state())).step == 3
    with (
        opened_with("xyz") as checkpoints,
        pytest.raises(UserError, match="t.model: is not the file that .*checkpoints/3"),
    ):
        checkpoints.restore_newest(abstract(make_state()))


def test_arrays_are_read_without_the_model(tmp_path):
    state = make_state(4)
    saved(tmp_path, state)
    arrays = load_arrays(tmp_path, 4)
    np.testing.assert_array_equal(
        arrays["learner/params/encoder/kernel"], state.params["encoder"]["kernel"]
    )
    assert arrays["optimizer/opt_state/0/mu"].dtype == jax.numpy.bfloat16
    assert len(arrays) == len(jax.tree.leaves(state))
    for path in data_files(tmp_path / "checkpoints" / "4" / "optimizer"):
        flip(path)
    with pytest.raises(CorruptCheckpointError):
        load_arrays(tmp_path, 4)
    learner = load_arrays(tmp_path, 4, items=("learner",))
    assert list(learner) == [path for path in arrays if path.startswith("learner/")]
    for path in data_files(tmp_path / "checkpoints" / "4" / "learner"):
        flip(path)
    with pytest.raises(CorruptCheckpointError):
        load_arrays(tmp_path, 4, items=("learner",))


def test_arrays_that_claim_more_than_their_files_hold(tmp_path):
    """An array of ones, of which the file says that it has 12 TB."""
    import tensorstore

    saved(tmp_path, make_state(4))
    base = f"file://{tmp_path}/checkpoints/4/learner/"
    store = {"driver": "ocdbt", "base": base, "path": "params.encoder.kernel/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": store}).result()
    array.resize(exclusive_max=[3, 10**12], resize_metadata_only=True).result()
    with pytest.raises(CorruptCheckpointError, match="its arrays claim 12,"):
        load_arrays(tmp_path, 4)
    with (
        contextlib.closing(Checkpoints(tmp_path, toy.config())) as checkpoints,
        pytest.raises(UserError, match="every checkpoint is corrupt"),
    ):
        checkpoints.restore_newest(abstract(make_state()))


@pytest.mark.parametrize(("mode", "best"), [("min", 4), ("max", 8)])
def test_the_best_by_an_evaluators_metric_is_kept(mode, best, tmp_path):
    values = {2: 0.5, 4: 0.2, 6: 0.4, 8: 0.9, 10: 0.3, 12: 0.6}
    c = toy.config(checkpoint__best="val/loss", checkpoint__best_mode=mode, checkpoint__keep_last=1)
    with contextlib.closing(Checkpoints(tmp_path, c)) as checkpoints:
        assert checkpoints.best_step() is None
        for step, value in values.items():  # evaluated after saving, as in the training loop
            checkpoints.save(make_state(step))
            files.write_text(tmp_path / "evals" / "val" / f"{step}.json", f'{{"loss": {value}}}')
    with contextlib.closing(Checkpoints(tmp_path, c, read_only=True)) as checkpoints:
        assert checkpoints.best_step() == best
    assert saved_steps(tmp_path) == [best, 12]


def test_minutes_count_from_the_last_save(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    c = toy.config(checkpoint__every_minutes=0.5)
    with contextlib.closing(Checkpoints(tmp_path, c)) as checkpoints:
        assert not checkpoints.minutes_passed()
        now[0] += 31
        assert checkpoints.minutes_passed()
        checkpoints.save(make_state())
        assert not checkpoints.minutes_passed()
    c.checkpoint.every_minutes = 0.0
    with contextlib.closing(Checkpoints(tmp_path, c)) as checkpoints:
        now[0] += 1e6
        assert not checkpoints.minutes_passed()


def test_orbax_is_configured_once_and_only_when_checkpoints_are_opened():
    program = """
import logging, sys
hook = sys.unraisablehook
from cap_pretrain.checkpoints import checkpoint, load, warm_start
from cap_pretrain.checkpoints.orbax_setup import configure_orbax
assert sys.unraisablehook is hook and not logging.getLogger("asyncio").filters
configure_orbax()
configured = sys.unraisablehook
assert configured is not hook
configure_orbax()
assert sys.unraisablehook is configured and len(logging.getLogger("asyncio").filters) == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=toy.CONFIGS.parent)
