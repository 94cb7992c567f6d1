"""XLA's compiler for NVIDIA GPUs, of the CUDA plugin of JAX, on a machine without GPUs."""

import collections
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cap_pretrain.errors import UserError
from cap_pretrain.topology import products
from cap_pretrain.topology.compiler import Compiler
from cap_pretrain.topology.targets import TARGETS, target_config
from cap_pretrain.topology.tpu import ATTENTION as ATTENTION_NAMES

if TYPE_CHECKING:
    import jax
    from ml_collections import ConfigDict

    from cap_pretrain.telemetry.flops import Chip
    from cap_pretrain.topology.cost import Cost
    from cap_pretrain.topology.hlo import Module

# Flags without which compiling needs a GPU: XLA would time kernels, and compare its own products
# with those of cuBLAS.
_FLAGS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": "false"}


class GPU(Compiler):
    """The compiler for NVIDIA GPUs."""

    device = "GPU"
    kinds = tuple(TARGETS)

    def environment(self) -> dict[str, str]:
        """Return variables to compile without a GPU."""
        return {
            # The CUDA plugin itself refuses to start without a GPU; compiling needs no start.
            "JAX_PLATFORMS": "cpu",
            # A program that was read from a cache would have to be loaded onto a GPU.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "3",  # no warnings of XLA about slow compiling and memory
        }

    def set_environment(self) -> None:
        """Set `environment`, and those of our XLA_FLAGS that the user has not set."""
        super().set_environment()
        given = os.environ.get("XLA_FLAGS", "")
        ours = [f"--{flag}={value}" for flag, value in _FLAGS.items() if flag not in given]
        os.environ["XLA_FLAGS"] = " ".join([given, *ours]).strip()

    def open(self, name: str, slices: int = 1) -> Sequence["jax.Device"]:
        """Return the devices of a topology like "h100:8" or "h100:8x8" (hosts x GPUs per host)."""
        if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
            raise UserError("JAX's CUDA plugin is not installed: pip install -e '.[cuda]'")
        from jax.experimental import topologies

        kind, _, shape = name.partition(":")
        if slices != 1:
            raise UserError(f"--slices: {name!r} has no slices; write hosts as {kind}:{slices}x8.")
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", shape):
            raise UserError(
                f"--topology: {name!r} lacks a number of GPUs; write it as {kind}:8, or with "
                f"several hosts as {kind}:4x8 (hosts x GPUs per host)."
            )
        shape = shape if "x" in shape else f"1x{shape}"
        try:
            return topologies.get_topology_desc(
                name, "cuda", target_config=target_config(TARGETS[kind]), topology=f"1x{shape}"
            ).devices
        except Exception as e:  # JaxRuntimeError or others, depending on the plugin
            reason = str(e).splitlines()[0].partition(": ")[2] or str(e)
            raise UserError(f"--topology: {name!r} is not possible: {reason}") from e

    def memory_limit(self, device: "jax.Device") -> int:
        """Return the bytes that a run takes from a GPU when it starts."""
        from cap_pretrain.distributed.gpu import memory_fraction

        (target,) = (t for t in TARGETS.values() if t.name == device.device_kind)
        return int(target.memory * memory_fraction())

    def choices(
        self, config: "ConfigDict", vocab_size: int, devices: Sequence["jax.Device"]
    ) -> dict[str, Any]:
        """Return the choices of a run on GPUs."""
        chosen: dict[str, Any] = {"dtype": "bfloat16"}
        if config.model.attention == "auto":
            dtype = chosen["dtype"] if config.dtype == "auto" else config.dtype
            reason = why_not_cudnn(config, dtype, vocab_size, devices[0])
            chosen["model.attention"] = "xla" if reason else "cudnn"
        return chosen

    def measure(self, module: "Module", chip: "Chip", devices: Sequence["jax.Device"]) -> "Cost":
        """Return the cost by a roofline."""
        from cap_pretrain.topology import roofline

        assert chip.ici_bandwidth
        per_host = len(devices) // len({device.process_index for device in devices})
        links = roofline.Links(per_host, chip.ici_bandwidth, self.network * 1e9 / 8)
        return roofline.measure(module, chip, len(devices), links)

    def operations(self, cost: "Cost") -> dict[str, Any]:
        """Return the seconds of products, of attention and of everything else."""
        seconds: dict[str, float] = collections.defaultdict(float)
        for (kernel, _), work in cost.work_of.items():
            seconds[kernel if kernel in products.KERNELS else "besides"] += work
        return {
            "operations": {
                "matrix products": sum(seconds[kernel] for kernel in products.PRODUCTS),
                "attention in cuDNN": sum(seconds[kernel] for kernel in products.ATTENTION),
                "besides products": seconds["besides"],
            },
            "besides_products_bytes": besides_bytes(cost),
            "besides_products_seconds": seconds["besides"],
            "kernel_flops": cost.flops,
            "hbm_bytes": cost.hbm_bytes,
        }

    def kind(self, kernel: str, name: str) -> str:
        """Return the kind of an operation by the kernel that runs it, or where it comes from."""
        if kernel in products.ATTENTION or ATTENTION_NAMES.search(name):
            return "attention"
        if kernel in products.PRODUCTS:
            return "products"
        return "layout" if re.search("copy|transpose|slice|concatenate", kernel) else "other"

    def notes(
        self,
        config: "ConfigDict",
        vocab_size: int,
        cost: "Cost",
        devices: Sequence["jax.Device"],
    ) -> dict[str, Any]:
        """Return the kernels that run, whether attention runs in cuDNN, and what is assumed."""
        seconds: dict[str, float] = collections.defaultdict(float)
        for (kernel, _), work in cost.work_of.items():
            seconds[kernel] += work
        kernels = [
            {"kernel": k, "count": cost.count[k], "bytes": cost.bytes_of[k], "seconds": seconds[k]}
            for k in sorted(seconds, key=lambda k: seconds[k], reverse=True)
        ]
        attention, line = attention_report(config, vocab_size, cost, devices[0])
        return {
            "kernels": kernels,
            "attention": attention,
            "remarks": [
                *line,
                f"Besides products and attention: {besides_bytes(cost) / 1e9:,.1f} GB of traffic.",
                roofline_remark(devices[0], self.network),
            ],
        }

    def of_size(self, topology: str, devices: int) -> tuple[str, int]:
        """Return the hosts with as many GPUs each as in `topology` that have `devices` in all."""
        kind, _, shape = topology.partition(":")
        per_host = int(shape.rpartition("x")[2])
        if devices < 1 or devices % per_host:
            raise UserError(
                f"--scan: {devices} GPUs is not a multiple of {per_host}, those of a host."
            )
        return f"{kind}:{devices // per_host}x{per_host}", 1


def besides_bytes(cost: "Cost") -> float:
    """Return the bytes that everything but products and attention reads and writes."""
    return sum(n for kernel, n in cost.bytes_of.items() if kernel not in products.KERNELS)


def attention_calls(
    config: "ConfigDict", dtype: str, vocab_size: int
) -> collections.Counter[tuple[tuple[int, ...], tuple[int, ...], bool]]:
    """Count the attention of one step's loss: query and key shapes [T, N, H], and if masked.

    Raises NotImplementedError or ValueError if JAX knows that cuDNN does not support one.
    """
    import copy

    import jax
    from flax import nnx
    from jax.extend.core import jaxprs_in_params

    from cap_pretrain import learners
    from cap_pretrain.training import plan

    config = copy.deepcopy(config)
    config.dtype, config.model.attention, config.model.remat = dtype, "cudnn", "none"
    key = jax.eval_shape(lambda: jax.random.key(0))
    learner = nnx.eval_shape(lambda: learners.build(config, vocab_size, jax.random.key(0)))
    graphdef, state = nnx.split(learner)

    def loss(state, batch, key):
        return nnx.merge(graphdef, state).loss(batch, key, train=True)[0]

    found: collections.Counter = collections.Counter()

    def walk(jaxpr, times: int) -> None:
        for equation in jaxpr.eqns:
            if equation.primitive.name.startswith("dot_product_attention_fwd"):
                query, keys, _, bias, *_ = (var.aval.shape for var in equation.invars)
                found[query[1:], keys[1:], 0 not in bias] += times
                continue
            inner = times * equation.params.get("length", 1)
            for other in jaxprs_in_params(equation.params):
                walk(getattr(other, "jaxpr", other), inner)

    walk(jax.make_jaxpr(loss)(state, plan.abstract_batch(config), key).jaxpr, 1)
    return found


def why_not_cudnn(config: "ConfigDict", dtype: str, vocab_size: int, device: "jax.Device") -> str:
    """Return why cuDNN's attention does not support a model on a GPU; "" if it does."""
    import jax.numpy as jnp

    from cap_pretrain.models import attention

    if dtype not in ("bfloat16", "float16"):
        return f"not in {dtype}"
    try:
        calls = attention_calls(config, dtype, vocab_size)
    except (NotImplementedError, ValueError) as e:
        return str(e).splitlines()[0]
    for query, keys, masked in calls:
        reason = attention.why_not_fused(
            query, keys, jnp.dtype(dtype), masked, config.deterministic, device
        )
        if reason:
            return f"{query} x {keys}{', masked' if masked else ''}: {reason.splitlines()[0]}"
    return ""


def attention_report(
    config: "ConfigDict", vocab_size: int, cost: "Cost", device: "jax.Device"
) -> tuple[dict[str, Any], list[str]]:
    """Return how much of the attention of a program from `config` runs in cuDNN, and a line."""
    forward, backward = (int(cost.count[kernel]) for kernel in products.ATTENTION)
    found: dict[str, Any] = {"cudnn_forward": forward, "cudnn_backward": backward}
    try:
        calls = sum(attention_calls(config, config.dtype, vocab_size).values())
    except (NotImplementedError, ValueError):
        calls = None
    if calls == 0:
        return found, []
    reason = ""
    if config.model.attention != "cudnn":
        reason = why_not_cudnn(config, config.dtype, vocab_size, device)
        reason = reason or f"model.attention={config.model.attention}, though cuDNN supports it"
    of = "" if calls is None else f" of {calls * config.accumulate}"
    line = f"Attention: {backward}{of} calls per step in cuDNN's fused kernel"
    if forward > backward:
        line += f", forward {forward} times"
    return found | {"calls": calls, "why_not": reason}, [f"{line}{': ' * bool(reason)}{reason}."]


def roofline_remark(device: "jax.Device", network: float) -> str:
    """Return what a prediction assumes of a device."""
    from cap_pretrain.telemetry import flops
    from cap_pretrain.topology import roofline

    chip = flops.chip_of(device)
    assert chip and chip.hbm_bandwidth and chip.peak and chip.ici_bandwidth
    return (
        f"Assumed: {roofline.HBM_SHARE:.0%} of {chip.hbm_bandwidth / 1e9:,.0f} GB/s of memory, "
        f"{roofline.PEAK_SHARE:.0%} of {chip.peak / 1e12:,.0f} TFLOP/s, {roofline.LINK_SHARE:.0%} "
        f"of {chip.ici_bandwidth / 1e9:,.0f} GB/s within a host and of {network:,.0f} Gb/s per GPU "
        "between hosts; starting a kernel takes no time."
    )
