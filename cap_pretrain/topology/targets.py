"""GPUs to compile for: the facts that XLA's compiler asks of a device.

Source: openxla/xla, `xla/backends/gpu/target_config/specs/*.txtpb`, of each GPU by its name.
`cap_pretrain/telemetry/flops.py` has what the compiler does not ask: peaks and links.
"""

import importlib.metadata
from typing import NamedTuple


class Target(NamedTuple):
    """A kind of GPU; sizes in bytes. A core is a streaming multiprocessor."""

    name: str  # as CUDA reports it
    capability: tuple[int, int, str]  # major, minor, feature extension
    cores: int
    units: int  # that process float32, per core
    threads: int  # per core
    shared_per_core: int
    shared_per_block: int  # if a kernel opts in
    l2: int
    clock: float  # GHz
    bandwidth: float  # of its memory, bytes/s
    memory: int


_PLAIN, _EXTENDED = "NONE", "ACCELERATED_FEATURES"
_KIB = 2**10

TARGETS: dict[str, Target] = {
    "a100-40": Target(
        *("NVIDIA A100-SXM4-40GB", (8, 0, _PLAIN), 108, 64, 2048, 164 * _KIB, 163 * _KIB),
        *(40 * _KIB**2, 1.41, 1555.2e9, 42331013120),
    ),
    "a100-80": Target(
        *("NVIDIA A100-SXM4-80GB", (8, 0, _PLAIN), 108, 64, 2048, 164 * _KIB, 163 * _KIB),
        *(40 * _KIB**2, 1.41, 2039.04e9, 85100068864),
    ),
    "h100": Target(
        *("NVIDIA H100 80GB HBM3", (9, 0, _EXTENDED), 132, 128, 2048, 228 * _KIB, 227 * _KIB),
        *(50 * _KIB**2, 1.98, 3352.32e9, 84942979072),
    ),
    "h200": Target(
        *("NVIDIA H200 141GB HBM3e", (9, 0, _EXTENDED), 132, 128, 2048, 228 * _KIB, 227 * _KIB),
        *(50 * _KIB**2, 1.98, 4800e9, 151397597184),
    ),
    "b200": Target(
        *("NVIDIA B200", (10, 0, _EXTENDED), 148, 128, 2048, 228 * _KIB, 227 * _KIB),
        *(132644864, 1.965, 7672.32e9, 191514411008),
    ),
    "rtx6000pro": Target(
        *("NVIDIA RTX PRO 6000 Blackwell", (12, 0, _PLAIN), 188, 128, 1536, 128 * _KIB, 99 * _KIB),
        *(128 * _KIB**2, 2.6, 1792e9, 103079215104),
    ),
    "a6000": Target(
        *("NVIDIA RTX A6000", (8, 6, _PLAIN), 84, 128, 1536, 100 * _KIB, 99 * _KIB),
        *(6 * _KIB**2, 1.8, 768.096e9, 51041271808),
    ),
}

# Which cuDNN to compile for, if none is installed.
_CUDNN = "9.10.0"


def cudnn_version() -> str:
    """Return the version of the installed cuDNN, as "9.10.0", or a recent one."""
    for wheel in ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            return ".".join(importlib.metadata.version(wheel).split(".")[:3])
        except importlib.metadata.PackageNotFoundError:
            continue
    return _CUDNN


def target_config(target: Target) -> str:
    """Return the `GpuTargetConfigProto` of a GPU in text form."""
    major, minor, extension = target.capability
    cudnn = cudnn_version()
    dnn = zip(("major", "minor", "patch"), cudnn.split("."), strict=True)
    return f"""\
platform_name: "CUDA"
device_description_str: "{target.name}"
dnn_version_info {{ {" ".join(f"{part}: {n}" for part, n in dnn)} }}
gpu_device_info {{
  name: "{target.name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  dnn_version: "{cudnn}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  core_count: {target.cores}
  fpus_per_core: {target.units}
  clock_rate_ghz: {target.clock}
  memory_bandwidth: {round(target.bandwidth)}
  device_memory_size: {target.memory}
  l2_cache_size: {target.l2}
  shared_memory_per_core: {target.shared_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {target.shared_per_block}
  threads_per_core_limit: {target.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
"""
