"""FLOPs of a function and peak FLOP/s of a device, from which model FLOP utilization follows.

    MFU = flops_per_example * examples_per_second / (peak FLOP/s of all devices)

`flops_per_example` is what the *model* needs for training, forward and backward, counted without
rematerialization: work that is repeated to save memory does not count. The peak is the dense
bfloat16 rate whatever the compute dtype, as in PaLM (arXiv 2204.02311, appendix B), so float32 runs
show how much they leave unused.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params


def count_flops(fn: Callable, *args: Any) -> int:
    """Count the FLOPs of the matrix products and convolutions in `fn(*args)`, by tracing only.

    A multiply-add counts as two. Element-wise operations, which memory traffic bounds, do not
    count. The body of a scan (or a `fori_loop` with fixed bounds) counts once per iteration, that
    of a `while_loop`, whose iterations are unknown, once, and a `cond` as its most expensive
    branch. A causal mask does not reduce the count. cuDNN attention counts as the matrix products
    it computes. A Pallas kernel, whose loop is hidden, raises NotImplementedError; trace a plain
    implementation.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    """Count the FLOPs of a traced function."""
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    """Count the FLOPs of one operation of a traced function, including those it calls."""
    name, params = equation.primitive.name, equation.params
    shapes = [getattr(var.aval, "shape", ()) for var in equation.invars]
    out = equation.outvars[0].aval.shape if equation.outvars else ()
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(shapes[0][d] for d in contracted)
    if name == "conv_general_dilated":
        kernel = math.prod(shapes[1]) // shapes[1][params["dimension_numbers"].rhs_spec[0]]
        # Input dilation (in the gradient of a strided convolution) inserts zeros, which are free.
        return 2 * math.prod(out) * kernel // math.prod(params["lhs_dilation"])
    if name.startswith("dot_product_attention"):  # cuDNN: query [B, T, N, H], key [B, S, K, H]
        products = 4 if "_bwd" in name else 2  # recomputed scores are not counted
        key_length = shapes[1][1 if params["layout"] == 0 else 2]
        return 2 * products * math.prod(shapes[0]) * key_length
    if name == "pallas_call":
        raise NotImplementedError("count_flops cannot see into a Pallas kernel")
    if name == "cond":
        return max(_count(branch) for branch in params["branches"])
    inner = sum(_count(jaxpr) for jaxpr in jaxprs_in_params(params))
    if name == "scan":
        return params["length"] * inner
    if name == "shard_map":  # the shapes inside are per shard
        return inner * math.prod(params["mesh"].shape[a] for a in params["newly_manual_axes"])
    return inner  # jit, while, remat, custom_jvp, custom_vjp, ...


class Chip(NamedTuple):
    """The performance of one JAX device; None where no public source states it."""

    peak: float | None  # dense bfloat16 FLOP/s with float32 accumulation
    hbm_bandwidth: float | None = None  # bytes/s
    # bytes/s sent over all links together: to neighboring TPUs, or over NVLink, if there is one
    ici_bandwidth: float | None = None
    clock: float | None = None  # Hz
    links: int | None = None  # to neighbors: four in a 2D torus, six in a 3D torus


def _tpu(peak: float, hbm: float, ici: float, products: int, links: int) -> Chip:
    """Return a TPU, given `ici` in bits/s; `products` per cycle (multiply-adds) give the clock."""
    return Chip(peak, hbm, ici / 8, peak / (2 * products), links)


# By substring of the lower-cased `device_kind`. The first match counts, so longer names come before
# the names they contain.
_CHIPS: tuple[tuple[str, Chip], ...] = (
    # Google Cloud documentation, "TPU versions" and the page of each version: peak compute per chip
    # (bf16), HBM bandwidth, inter-chip interconnect bandwidth (in one direction), matrix units
    # (MXU), links. A v2, v3 or 7x chip shows as two devices.
    ("tpu v2", Chip(46e12 / 2)),
    ("tpu v3", Chip(123e12 / 2)),
    # v4i: Jouppi et al., "Ten Lessons From Three Generations", ISCA 2021
    ("tpu v4 lite", Chip(137e12)),
    # Six links of 50 GB/s, and 1050 MHz, which also follows: Jouppi et al., "TPU v4", ISCA 2023,
    # table 4
    ("tpu v4", _tpu(275e12, 1200e9, 2400e9, 8 * 128**2, 6)),
    ("tpu v5 lite", _tpu(197e12, 819e9, 1600e9, 4 * 128**2, 4)),  # v5e
    ("tpu v5e", _tpu(197e12, 819e9, 1600e9, 4 * 128**2, 4)),
    ("tpu v5", _tpu(459e12, 2765e9, 4800e9, 8 * 128**2, 6)),  # v5p
    # v6e, "TPU v6 lite". Its page lists two units of 256 x 256, but the compiler's estimates for
    # large matrix products exceed what two units can do per cycle, so there must be four.
    ("tpu v6", _tpu(918e12, 1638e9, 3200e9, 4 * 256**2, 4)),
    ("tpu7x", Chip(2307e12 / 2)),
    # NVIDIA data sheets; half of the printed rate where that is "with sparsity". Of the bandwidth
    # of NVLink, or of PCIe where that joins the GPUs of a host, half is in one direction.
    ("mig", Chip(None)),  # a slice of a GPU, whose compute share the name does not state
    ("gb200", Chip(2500e12)),  # GB200 NVL72 data sheet: 360 PFLOP/s sparse over 72 GPUs
    ("b200", Chip(2250e12, 7672e9, 900e9)),  # HGX B200 data sheet; XLA's specs (its memory)
    ("h200 nvl", Chip(835e12)),  # H200 data sheet
    ("h200", Chip(989e12, 4800e9, 450e9)),  # H200 data sheet (SXM), GH200 data sheet
    ("h100 nvl", Chip(835e12)),  # H100 NVL data sheet
    ("h100 pcie", Chip(756e12)),  # H100 data sheet
    ("h100", Chip(989e12, 3352e9, 450e9)),  # H100 data sheet (SXM)
    ("a100-sxm4-40gb", Chip(312e12, 1555e9, 300e9)),  # A100 data sheet
    ("a100-sxm4-80gb", Chip(312e12, 2039e9, 300e9)),  # A100 data sheet
    ("a100", Chip(312e12)),  # A100 data sheet
    ("a10g", Chip(70e12)),  # A10G data sheet
    ("a10", Chip(125e12)),  # A10 data sheet
    ("a30", Chip(165e12)),  # A30 data sheet
    ("a40", Chip(149.7e12)),  # A40 data sheet
    ("l40s", Chip(362e12)),  # L40S data sheet
    ("l40", Chip(181e12)),  # L40 data sheet
    ("l4", Chip(121e12)),  # L4 data sheet
    # RTX Blackwell PRO whitepaper, table of the RTX PRO 6000 (workstation); PCIe 5.0 x16
    ("rtx pro 6000", Chip(503.8e12, 1792e9, 64e9)),
    ("rtx a6000", Chip(154.8e12, 768e9, 32e9)),  # RTX A6000 data sheet; PCIe 4.0 x16
    ("rtx 4090", Chip(165.2e12)),  # Ada GPU architecture whitepaper, appendix A
    ("rtx 3090", Chip(71e12)),  # GA102 whitepaper, table 9
    # These have no bfloat16 units: the float16 rate.
    ("t4", Chip(65e12)),  # T4 data sheet
    ("v100-pcie", Chip(112e12)),  # V100 data sheet
    ("v100", Chip(125e12)),  # V100 data sheet (SXM2)
)


def chip_of(device: jax.Device) -> Chip | None:
    """Return the performance of a device by its `device_kind`, or None if unknown."""
    kind = device.device_kind.lower()
    return next((chip for name, chip in _CHIPS if name in kind), None)


def peak_flops(device: jax.Device) -> float | None:
    """Return the dense bfloat16 peak of one device in FLOP/s, or None if unknown."""
    chip = chip_of(device)
    return chip.peak if chip else None


@functools.cache
def measure_matmul_flops(device: jax.Device, size: int = 1024) -> float:
    """Measure the FLOP/s of a float32 product of two [size, size] matrices, the best of five.

    For CPUs, whose peak does not follow from their name. Takes about 0.2 s, once for a process.
    """
    matrix = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    multiply = jax.jit(jnp.matmul)
    multiply(matrix, matrix).block_until_ready()  # compiles
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


class Peak(NamedTuple):
    """The peak that MFU is relative to."""

    flops: float | None  # FLOP/s of all devices; None if unknown, and MFU is then not reported
    label: str  # "MFU", or "MFU(cpu)" if relative to a measurement
    source: str  # a line for the log


def system_peak(devices: Sequence[jax.Device]) -> Peak:
    """Return the peak of all `devices` together; on CPU, the measured matmul rate of each host.

    A CPU host counts once, however many devices it is split into, because they share its cores.
    """
    kind, one = devices[0].device_kind, peak_flops(devices[0])
    if one is not None:
        source = f"{len(devices)} x {kind}, {one / 1e12:.4g} TFLOP/s dense bfloat16 each"
        return Peak(one * len(devices), "MFU", source)
    if devices[0].platform != "cpu":
        return Peak(None, "MFU", f"the peak of {kind!r} is unknown, so MFU is not reported")
    hosts = len({device.process_index for device in devices})
    one = measure_matmul_flops(jax.local_devices(backend="cpu")[0])
    source = f"{hosts} x {one / 1e9:.4g} GFLOP/s, measured in a float32 matmul on this CPU"
    return Peak(one * hosts, "MFU(cpu)", source)
