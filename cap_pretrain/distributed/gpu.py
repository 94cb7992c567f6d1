"""Settings for NVIDIA GPUs, made where the user has made none; docs/gpu.md gives the reasons.

Sources: NVIDIA JAX-Toolbox, docs/GPU_performance.md; JAX, docs/gpu_performance_tips.md. The rest of
what these list is XLA's default by now, or made no difference to our step in XLA's GPU compiler.
"""

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path

import jax

from cap_pretrain.distributed import determinism

MEMORY_FRACTION = 0.9
"""Share of a GPU's memory that JAX takes at its start (its default: 0.75).

JAX-Toolbox: "typically 0.9 or 0.8". The rest is for CUDA, NCCL and cuDNN.
"""

# The second is the older name, still read; JAX refuses both together.
_FRACTION_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

OVERLAP = "xla_gpu_enable_latency_hiding_scheduler"
"""XLA's option to schedule computation between the start and the end of a collective.

In jaxlib 0.10.2, XLA does so by itself for H100 and B200, but not for A100. An option of
`jax.jit`, not of XLA_FLAGS, which would abort the process if a version did not know it.
"""


def will_be_used() -> bool:
    """Return whether JAX is going to use NVIDIA GPUs, without starting any device."""
    platforms = jax.config.values["jax_platforms"] or "cuda"
    if not {"cuda", "gpu"} & set(platforms.split(",")):
        return False
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        return False
    plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13", "jax_cuda12_plugin")
    return any(map(_installed, plugins)) and any(map(_nodes, ("nvidia[0-9]*", "dxg")))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def _nodes(pattern: str) -> bool:
    """Return whether there are such devices; dxg is the GPU of Windows' Linux (WSL)."""
    return any(Path("/dev").glob(pattern))


def set_environment() -> None:
    """Have JAX take MEMORY_FRACTION of each GPU, unless the user says how much.

    Call it before devices are used.
    """
    if will_be_used() and not any(map(os.environ.get, _FRACTION_NAMES)):
        os.environ[_FRACTION_NAMES[0]] = str(MEMORY_FRACTION)


def memory_fraction() -> float:
    """Return the share of a GPU's memory that a run takes, the user's or MEMORY_FRACTION."""
    users = next(filter(None, map(os.environ.get, _FRACTION_NAMES)), None)
    return float(users or MEMORY_FRACTION)


def compiler_options(
    devices: Iterable[jax.Device], *, deterministic: bool
) -> dict[str, bool | int] | None:
    """Return the `compiler_options` argument of `jax.jit` for the training step on `devices`."""
    options = dict(determinism.compiler_options(deterministic) or {})
    platforms = [device.platform for device in devices]
    if len(platforms) > 1 and platforms[0] in ("gpu", "cuda") and not _users(OVERLAP):
        options[OVERLAP] = True
    return options or None


def _users(option: str) -> bool:
    """Return whether the user has set an option of XLA."""
    return option in os.environ.get("XLA_FLAGS", "")


def describe() -> list[str]:
    """Return a line for the log about these settings, on GPUs."""
    if jax.default_backend() != "gpu":
        return []
    said = []
    if any(map(os.environ.get, _FRACTION_NAMES)):
        said.append(f"{memory_fraction():.0%} of the memory (XLA_CLIENT_MEM_FRACTION)")
    if jax.device_count() > 1:
        overlap = "as XLA_FLAGS says" if _users(OVERLAP) else "overlaps with computation"
        said.append(f"communication {overlap} ({OVERLAP} in XLA_FLAGS)")
    return [f"GPU settings: {', '.join(said)}."] if said else []
