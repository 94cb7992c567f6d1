"""Programs of both compilers, the roofline of GPUs, and compiling for GPUs without one."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cap_pretrain.commands import check_topology
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry import flops
from cap_pretrain.telemetry.flops import Chip
from cap_pretrain.topology import compile as compiling
from cap_pretrain.topology import compilers, cycles, gpu, hlo, products, report, roofline, targets

ROOT = Path(__file__).parents[2]
STORED = Path(__file__).parent / "stored"
# A usable GB/s and a usable 100 GFLOP/s.
CHIP = Chip(1e11 / roofline.PEAK_SHARE, 1e9 / roofline.HBM_SHARE)
X, W = 2 * 4096 * 256, 2 * 256 * 256  # bytes of the activations of a layer, and of its weights


def stored(compiler: str) -> hlo.Module:
    return hlo.parse((STORED / f"{compiler}.hlo").read_text())


def measure(module: hlo.Module, devices: int = 2, **links: float):
    speeds = {"per_host": devices, "nvlink": 1e9, "network": 1e9} | links
    return roofline.measure(module, CHIP, devices, roofline.Links(**speeds))


def test_a_program_of_the_tpu_compiler():
    chip = Chip(1.0, 1e9, 4e9, 1e9, links=4)
    found = cycles.measure(stored("tpu"), chip, 4)
    assert found.work == 6 * (6336 + 10434) + 10195
    # One ring has half of the links, and each chip sends 1.5 times the array.
    assert found.waited["ici"] == pytest.approx(1.5 * 2 * 2048 * 256 / 2e9)
    assert found.seconds == pytest.approx(found.work / 1e9 + found.waited["ici"])
    # Of what is not in the core's own memory, an iteration reads a slice of the weights.
    assert found.hbm_bytes == 6 * (W + 3 * 4 + 4) + 2 * 4 + 2 * 2048 * 256


def test_a_program_of_the_gpu_compiler():
    product, attention = 2 * 4096 * 256 * 256, 4 * 64 * 4 * 64 * 64 * 64
    module = stored("gpu")
    found = measure(module, nvlink=W / 0.01 / roofline.LINK_SHARE)
    assert found.flops == 7 * product + 6 * attention and not found.endless
    moved = {
        "loop_dynamic_slice_fusion": 6 * (2 * W + 4),
        "cuBLAS product": 6 * (2 * X + W) + 2 * X + W,  # without the workspace
        "loop_convert_fusion": 6 * 2 * X,
        "loop_dynamic_update_slice_fusion": 6 * (2 * X + 4),
        "cuDNN attention": 6 * (4 * X + 4 * 64 * 4 * 64),
        "copy": 2 * X + 2 * W,
    }
    assert found.bytes_of == moved and found.hbm_bytes == sum(moved.values())
    assert found.count["cuBLAS product"] == 7 and found.count["cuDNN attention"] == 6
    # Products are bound by their FLOPs, everything else by its bytes.
    besides = sum(n for kernel, n in moved.items() if kernel != "cuBLAS product")
    assert found.work == pytest.approx(7 * product / 1e11 + besides / 1e9)
    # The all-reduce takes 10 ms, of which a copy hides a part.
    assert found.collectives["all-reduce"].sent == W
    assert found.waited["ici"] == pytest.approx(0.01 - 2 * X / 1e9)
    assert found.seconds == pytest.approx(found.work + found.waited["ici"])


def test_a_synchronous_collective_hides_nothing():
    text = (STORED / "gpu.hlo").read_text().replace('"is_sync":false', '"is_sync":true')
    found = measure(hlo.parse(text), nvlink=W / 0.01 / roofline.LINK_SHARE)
    assert found.waited["ici"] == pytest.approx(0.01)


def entry(lines: str, before: str = "") -> hlo.Module:
    return hlo.parse(
        f"HloModule f, is_scheduled=true\n\n{before}ENTRY %main (a: bf16[64,32]) -> bf16[8] {{\n"
        f"  %a = bf16[64,32]{{1,0}} parameter(0)\n{lines}}}\n"
    )


CONVOLUTION = (
    'custom-call(%a, %b), dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{}"\n'
)


@pytest.mark.parametrize(
    ("lines", "before", "name", "flops"),
    [
        (
            "  %o = bf16[64,16]{1,0} fusion(%a), kind=kCustom, calls=%gemm\n",
            "%gemm (p: bf16[64,32]) -> bf16[64,16] {\n  %p = bf16[64,32]{1,0} parameter(0)\n"
            "  %w = bf16[32,16]{1,0} constant({...})\n  ROOT %d = bf16[64,16]{1,0} dot(%p, %w), "
            "lhs_contracting_dims={1}, rhs_contracting_dims={0}\n}\n\n",
            products.FUSED,
            2 * 64 * 16 * 32,
        ),
        (
            "  %q = bf16[2,8,3,16]{3,2,1,0} bitcast(%a)\n  %o = (bf16[2,3,8,16]{3,1,2,0}, "
            "bf16[2,3,8,16]{3,1,2,0}, bf16[2,3,8,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), "
            'custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config='
            '{"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", '
            '"dimensions": ["2", "3", "8", "8"], "tuple_shapes": []}}}\n',
            "",
            products.ATTENTION[1],
            5 * 2 * 2 * 3 * 8 * 8 * 16,
        ),
        (
            "  %b = bf16[7,3,3,5]{3,2,1,0} constant({...})\n"
            "  %o = (bf16[2,9,9,7]{3,2,1,0}, u8[0]{0}) " + CONVOLUTION.format("Forward"),
            "",
            products.CONVOLUTION,
            2 * (2 * 9 * 9 * 7) * (3 * 3 * 5),
        ),
        (
            "  %b = bf16[2,9,9,7]{3,2,1,0} constant({...})\n"
            "  %o = (bf16[7,3,3,5]{3,2,1,0}, u8[0]{0}) " + CONVOLUTION.format("BackwardFilter"),
            "",
            products.CONVOLUTION,
            2 * (2 * 9 * 9 * 7) * (3 * 3 * 5),
        ),
    ],
)
def test_flops_of_kernels(lines: str, before: str, name: str, flops: float):
    module = entry(lines, before)
    op = module.operation("main", "o")
    assert op and products.flops_of(module, "main", op) == flops
    assert products.kernel_name(op, flops) == name


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("replica_groups=[2,8]<=[16]", range(8)),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", (0, 8)),
        ("replica_groups={{0,8},{1,9},{2,10},{3,11}}", (0, 8)),
        ("replica_groups={}", range(16)),
        ("replica_groups=mesh['a'=2,'b'=8,'c'=1] {'b'}", range(8)),
        ("replica_groups=mesh['a'=2,'b'=8] {'a'}", (0, 8)),
        ("replica_groups=mesh['a'=1,'b'=8,'c'=2], device_ids=([2,8]T(1,0)) {'b'}", range(8)),
        ("replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'b'}", (0, 8)),
        ("replica_groups=mesh['a'=2,'b'=8] {'b':(2)4}", range(4)),
        ("replica_groups=mesh['a'=2,'b'=8] {'b':(1)2}", (0, 4)),
    ],
)
def test_members_of_a_group(groups: str, members):
    module = entry(f"  %o = bf16[64,32]{{1,0}} all-reduce(%a), {groups}, to_apply=%add\n")
    op = module.operation("main", "o")
    assert op and module.members(op, 16) == tuple(members)
    assert module.groups(op, 16) == len(members)


@pytest.mark.parametrize(
    ("kind", "groups", "seconds"),
    [
        ("all-reduce", "[2,8]<=[16]", 1.75 / 10),  # within each host
        ("all-reduce", "[8,2]<=[2,8]T(1,0)", 1.0),  # one GPU of each host
        ("all-reduce", "[1,16]<=[16]", 1.875 / 8),  # eight GPUs share what they send
        ("all-gather", "[1,16]<=[16]", 15 / 8),
        ("all-to-all", "[1,16]<=[16]", 0.5),
        ("reduce-scatter", "[4,4]<=[16]", 0.75 / 10),
    ],
)
def test_the_network_between_hosts(kind: str, groups: str, seconds: float):
    module = entry(f"  %o = bf16[64,32]{{1,0}} {kind}(%a), replica_groups={groups}\n")
    size = 2 * 64 * 32
    speed = size / roofline.LINK_SHARE
    found = measure(module, 16, per_host=8, nvlink=10 * speed, network=speed)
    assert found.seconds == pytest.approx(seconds)


def test_what_runs_on_another_stream_counts():
    inside = (
        "%copying (p: bf16[64,32]) -> bf16[64,32] {\n  %p = bf16[64,32]{1,0} parameter(0)\n"
        "  ROOT %c = bf16[64,32]{1,0} copy(%p)\n}\n\n"
    )
    lines = (
        "  %s = ((bf16[64,32]), bf16[64,32]) async-start(%a), calls=%copying\n"
        "  %d = bf16[64,32]{1,0} async-done(%s)\n"
    )
    assert measure(entry(lines, inside)).bytes_of == {"copy": 2 * 2 * 64 * 32}


def test_the_flags_of_the_user_are_kept(monkeypatch):
    for name in gpu.GPU().environment():
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=2 --xla_foo")
    gpu.GPU().set_environment()
    flags = "--xla_gpu_autotune_level=2 --xla_foo --xla_gpu_enable_triton_gemm=false"
    assert os.environ["XLA_FLAGS"] == flags and os.environ["JAX_PLATFORMS"] == "theirs"


def devices(name: str):
    """Return what stands for the GPUs of a topology."""
    kind, _, shape = name.partition(":")
    hosts, _, each = shape.rpartition("x")
    return [
        SimpleNamespace(
            platform="gpu", device_kind=targets.TARGETS[kind].name, process_index=i // int(each)
        )
        for i in range(int(hosts or 1) * int(each))
    ]


@pytest.fixture
def stubs(monkeypatch):
    """Replace compiling by the stored program, which needs 60 GiB."""
    memory = compiling.Memory(0, 2**30, 0, 59 * 2**30, 0)

    def compile_step(config, vocab_size, devices):
        text = (STORED / "gpu.hlo").read_text().replace("'axis_0'=2", f"'axis_0'={len(devices)}")
        limited = dataclasses.replace(memory, limit=gpu.GPU().memory_limit(devices[0]))
        return compiling.Compiled(text, limited, 1.0)

    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(gpu.GPU, "set_environment", lambda self: None)
    monkeypatch.setattr(gpu.GPU, "open", lambda self, name, slices=1: devices(name))
    monkeypatch.setattr(gpu, "attention_calls", lambda *a: {((64, 4, 64), (64, 4, 64), False): 6})
    monkeypatch.setattr(gpu, "why_not_cudnn", lambda *a: "(64, 4, 64): no engine")
    monkeypatch.setattr(report, "compile_step", compile_step)
    monkeypatch.setattr(report.plan, "flops_per_example", lambda *a: {"training": 1e9})


TINY = [
    "--config=configs/pretrain.py:objective=cap,model=mu/8",
    *("--config.batch_size=16", "--config.data.image_size=16", "--config.text.vocab_size=50"),
]


def test_a_report(stubs, capsys, tmp_path):
    path = tmp_path / "r.json"
    arguments = [*TINY, "--topology=h200:2x4", "--network=100", "--breakdown", f"--json={path}"]
    assert check_topology.main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "captioner mu/8, batch 16 on h200:2x4: 8 x NVIDIA H200",
        *("2 examples per GPU", "memory per GPU", "needed 60.00", "predicted, not measured"),
        *("matrix products", "attention in cuDNN", "besides products", "100 Gb/s per GPU"),
        "Attention: 0 of 6 calls per step in cuDNN's fused kernel, forward 6 times: (64, 4, 64): "
        "no engine.",
    ):
        assert text in printed
    (found,) = json.loads(path.read_text())
    predicted = found["predicted"]
    assert predicted["besides_products_bytes"] == sum(
        k["bytes"] for k in found["kernels"] if k["kernel"] not in products.KERNELS
    )
    parts = sum(sum(kinds.values()) for kinds in found["seconds_by_part"].values())
    assert parts == pytest.approx(sum(predicted["operations"].values()))


def test_too_large_for_what_xla_takes_of_a_gpu(stubs, capsys, monkeypatch):
    arguments = [*TINY, "--topology=h100:8"]
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.75")
    assert check_topology.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "does not fit: needs 60.00 GiB of memory per GPU, 59.33 are available: 0.67" in printed
    assert "Nothing that was tried fits: use more GPUs" in printed
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION")  # a run takes 0.9
    assert check_topology.main(arguments) == 0


def test_weak_scaling_over_hosts(stubs, capsys):
    assert check_topology.main([*TINY, "--topology=h200:8", "--scan=8,32"]) == 0
    assert "2 examples per GPU" in (out := capsys.readouterr().out)
    assert "h200:1x8" in out and "h200:4x8" in out
    with pytest.raises(UserError, match="12 GPUs is not a multiple of 8"):
        gpu.GPU().of_size("a100-80:8", 12)


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("h100", "lacks a number of GPUs"),
        ("h100:0x8", "lacks a number of GPUs"),
        ("h100:2x2x2", "lacks a number of GPUs"),
        ("a100:8", "no chip 'a100' in 'a100:8', only v4"),
    ],
)
def test_mistakes(topology: str, message: str, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=message):
        compilers.open_topology(topology)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[cuda\]'"):
        compilers.open_topology("h100:8")


@pytest.mark.parametrize("kind", targets.TARGETS)
def test_the_performance_of_a_kind_is_known(kind: str):
    (device,) = devices(f"{kind}:1")
    chip = flops.chip_of(device)
    assert chip and chip.peak and chip.ici_bandwidth
    assert chip.hbm_bandwidth == pytest.approx(targets.TARGETS[kind].bandwidth, rel=0.001)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs the extra `cuda`"
)
def test_a_step_of_training(tmp_path):
    """In another process, because the compiler reads its flags when JAX starts."""
    path = tmp_path / "r.json"
    program = [sys.executable, "tools/check_topology.py", "--topology=h100:2", f"--json={path}"]
    done = subprocess.run([*program, *TINY], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "matrix products" in done.stdout and "in cuDNN's fused kernel" in done.stdout
    (found,) = json.loads(path.read_text())
    assert found["fits"] and found["chips"] == 2 and not found["loops_of_unknown_length"]
    # Two layers of the encoder; one of the decoder attends to itself and to the image.
    assert found["attention"]["calls"] == 4
    counted = found["flops_per_step"] / 2
    assert counted < found["predicted"]["kernel_flops"] < 1.5 * counted
    parameters = found["arguments"]
    assert parameters / 8 < found["collectives"]["all-reduce"]["bytes"] < parameters
