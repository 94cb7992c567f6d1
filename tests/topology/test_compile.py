"""Compiling for TPUs on a machine without them, and the reports about it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cap_pretrain.commands import check_topology
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry.flops import chip_of
from cap_pretrain.topology import compile as compiling
from cap_pretrain.topology import cost, cycles, hlo, report, tpu
from cap_pretrain.topology.compiler import OutOfMemoryError
from cap_pretrain.topology.compilers import open_topology
from tests.parity import require
from tests.topology.programs import program

require("libtpu")
pytestmark = pytest.mark.parity
tpu.TPU().set_environment()

TINY = [
    *("--config=configs/pretrain.py:objective=cap,model=mu/8", "--topology=v5e:2x2"),
    *("--config.batch_size=8", "--config.data.image_size=16", "--config.text.vocab_size=50"),
]


@functools.cache
def devices():
    return open_topology("v5e:2x2")


def measure(f, *shapes: tuple[jax.ShapeDtypeStruct, ...]) -> cost.Cost:
    text = jax.jit(f).lower(*shapes).compile().as_text()
    return cycles.measure(hlo.parse(text), chip_of(devices()[0]), 4)


def test_the_body_of_a_scan_counts_once_per_iteration():
    alone = jax.sharding.SingleDeviceSharding(devices()[0])
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16, sharding=alone)

    def products(x, turns):
        return jax.lax.scan(lambda y, _: (jnp.tanh(y @ x), None), x, length=turns)[0]

    few, many = (measure(functools.partial(products, turns=turns), x) for turns in (10, 30))
    chip = chip_of(devices()[0])
    per_turn = (many.work - few.work) / 20
    ideal = 2 * 1024**3 / chip.peak * chip.clock
    assert ideal < per_turn < 3 * ideal
    assert few.work == pytest.approx(10 * per_turn, rel=0.3)


def test_collectives_count_once_per_iteration():
    mesh = Mesh(np.array(devices()), ("d",))

    def one(x):
        def turn(x, _):
            return jax.lax.psum(jnp.sin(x), "d"), None

        return jax.lax.all_gather(jax.lax.scan(turn, x, length=5)[0], "d", tiled=True)

    f = jax.shard_map(one, mesh=mesh, in_specs=P("d"), out_specs=P(), check_vma=False)
    x = jax.ShapeDtypeStruct((32, 128), jnp.float32, sharding=NamedSharding(mesh, P("d")))
    found = measure(f, x).collectives
    part = 4 * 8 * 128
    assert found["all-reduce"].count == 5 and found["all-gather"].count == 1
    assert found["all-reduce"].bytes == 5 * part and found["all-reduce"].sent == 7.5 * part
    assert found["all-gather"].bytes == part and found["all-gather"].sent == 3 * part


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [("v5e:4x4", 16, "lite"), ("v4:2x2x2", 8, "v4"), ("v5p:2x2x2", 8, "v5")],
)
def test_topologies(name: str, count: int, kind: str):
    found = open_topology(name)
    assert len(found) == count and kind in found[0].device_kind


@pytest.mark.parametrize(
    ("name", "slices", "fields", "shape"),
    [
        ("v5e:4x8", 1, {}, (2, 16, 1)),
        ("v5e:2x4", 1, {}, (2, 4, 1)),
        ("v5e:2x2", 1, {}, (2, 2, 1)),
        ("v5e:2x2", 2, {}, (2, 4, 1)),
        ("v5e:4x4", 1, {"mesh.tensor": 4}, (2, 2, 4)),
        ("v5e:4x4", 1, {"mesh.data": 16}, (16, 1, 1)),
        ("v5e:4x4", 1, {"mesh.data": 4}, (4, 4, 1)),
        ("v5e:4x4", 1, {"mesh.data": 2, "mesh.tensor": -1}, (2, 1, 8)),
        ("v4:4x4x4", 1, {"mesh.fsdp": 8}, (8, 8, 1)),  # a part of one dimension of the wiring
    ],
)
def test_by_default_up_to_sixteen_tpus_of_a_slice_shard_the_state(name, slices, fields, shape):
    fields = {"batch_size": 64, **fields}
    config = compiling_config(*(f"--config.{field}={n}" for field, n in fields.items()))
    mesh = sharding.make_mesh(config, open_topology(name, slices))
    assert tuple(mesh.shape.values()) == shape


def test_slices_split_the_data_axis():
    two = open_topology("v5e:2x2", slices=2)
    config = compiling_config("--config.mesh.fsdp=2")
    mesh = sharding.make_mesh(config, two)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    slices = [[d.slice_index for d in row.flat] for row in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(UserError, match="mesh.data: 1 does not divide by the 2 slices"):
        sharding.make_mesh(compiling_config("--config.mesh.fsdp=8"), two)


@pytest.mark.parametrize(
    ("kind", "gib"), [("v5e:2x2", 15.75), ("v4:2x2x1", 30.75), ("v5p:2x2x1", 95.74)]
)
def test_hbm_limit(kind: str, gib: float):
    # Google documents 16, 32 and 95 GB; the compiler reserves some of it.
    limit = tpu.hbm_limit(open_topology(kind)[0])
    assert limit / 2**30 == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "chips", "expected"),
    [
        ("v5e", 16, ("v5e:4x4", 1)),
        ("v5e", 128, ("v5e:8x16", 1)),
        ("v5e", 1024, ("v5e:16x16", 4)),
        ("v5p", 16, ("v5p:2x2x4", 1)),
        ("v4", 64, ("v4:4x4x4", 1)),
        ("v5p", 1024, ("v5p:8x8x16", 1)),
    ],
)
def test_slice_of_so_many_chips(kind: str, chips: int, expected: tuple[str, int]):
    assert tpu.slice_of(kind, chips) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:2x2"], "no chip 'v9'"),
        (["--topology=v5e"], "lacks a shape"),
        (["--topology=v5e:3x3"], "is not possible"),
        (["--config.mesh.fsdp=3"], "mesh.fsdp=3"),
        (["--config.batch_size=6"], "batch_size: 6"),
        (["--config.nonsense=1"], "nonsense"),
        (["--scan=12"], "12 chips"),
    ],
)
def test_mistakes_give_short_messages(arguments, message, capsys):
    assert check_topology.main([*TINY, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") <= 2 and not out


def test_without_the_compiler(monkeypatch, capsys):
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
    assert check_topology.main(TINY) == 2
    assert "pip install -e '.[tpu]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (20.00G) exceeds available HBM (16.00G).",
        "Ran out of memory in memory space hbm. Used 20.00G of 16.00G hbm. Exceeded by 4.00G.",
    ],
)
def test_the_report_says_how_much_memory_is_missing_and_what_fits(
    message, monkeypatch, capsys, tmp_path
):
    memory = compiling.Memory(2**34, 2**30, 0, 2**33, 2**20)
    compiled = compiling.Compiled(program(""), memory, seconds=1.0)

    def compile_step(config, vocab_size, devices):
        if config.accumulate < 4 and config.model.remat == "none":
            raise tpu.out_of_memory(RuntimeError(message))
        return compiled

    monkeypatch.setattr(report, "compile_step", compile_step)
    monkeypatch.setattr(tpu.TPU, "measure", lambda *a: cost.Cost(seconds=1.0))
    monkeypatch.setattr(report.plan, "flops_per_example", lambda *a: {"training": 1.0})
    big = ["--config.batch_size=16", "--config.model.remat=none", f"--json={tmp_path / 'r.json'}"]
    assert check_topology.main([*TINY, *big]) == 1
    printed = capsys.readouterr().out
    assert "does not fit: needs 20.00 GiB of HBM per chip, 16.00 are available: 4.00 GiB" in printed
    first, *tried = json.loads((tmp_path / "r.json").read_text())
    assert not first["fits"]
    # More parts are not faster here, which ends the search; 4 parts leave one example per chip.
    assert [(r["accumulate"], r["remat"], r["fits"]) for r in tried] == [
        *((2, "none", False), (4, "none", True), (1, "lean", True), (2, "lean", True))
    ]
    assert [r["changes"].get("accumulate", 1) for r in tried] == [2, 4, 1, 2]
    assert "fastest that fits: --config.model.remat=none --config.accumulate=4:" in printed


@pytest.mark.slow
def test_a_step_of_training(capsys, tmp_path):
    path = tmp_path / "r.json"
    assert check_topology.main([*TINY, "--breakdown", f"--json={path}"]) == 0
    printed = capsys.readouterr().out
    for text in ("HBM per chip", "all-reduce", "predicted, not measured", "roofline", "MFU"):
        assert text in printed
    (found,) = json.loads(path.read_text())
    assert found["fits"] and found["chips"] == 4 and found["batch_per_chip"] == 2
    assert 0 < found["needed"] < found["limit"] and not found["loops_of_unknown_length"]
    parts = sum(sum(kinds.values()) for kinds in found["seconds_by_part"].values())
    predicted = found["predicted"]
    assert parts == pytest.approx(predicted["cycles"] / predicted["clock"])
    assert predicted["step_seconds"] >= predicted["cycles"] / predicted["clock"]
    # Every gradient is summed over the chips once, in float32 or in bfloat16.
    parameters = found["arguments"]
    assert parameters / 8 < found["collectives"]["all-reduce"]["bytes"] < parameters


@pytest.mark.slow
def test_a_step_that_is_too_large():
    config = compiling_config("--config.batch_size=4194304")
    with pytest.raises(OutOfMemoryError) as found:
        compiling.compile_step(*compiling.prepare(config), devices())
    assert found.value.needed > found.value.limit > 15 * 2**30


def compiling_config(*overrides: str):
    from cap_pretrain.sweeps.trials import Trial, parse_overrides

    _, _, *fields = TINY
    config = TINY[0].removeprefix("--config=")
    return Trial("t", config, parse_overrides([*fields, *overrides])).resolved()


def test_the_mesh_must_divide():
    prepared = compiling.prepare(compiling_config("--config.mesh.tensor=3"))
    with pytest.raises(UserError, match=r"mesh\.tensor=3"):
        compiling.compile_step(*prepared, devices())
