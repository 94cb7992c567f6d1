"""The TPU compiler of the `libtpu` wheel, on a machine without TPUs."""

import functools
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cap_pretrain.errors import UserError
from cap_pretrain.topology.compiler import Compiler, OutOfMemoryError

if TYPE_CHECKING:
    import jax
    from ml_collections import ConfigDict

    from cap_pretrain.telemetry.flops import Chip
    from cap_pretrain.topology.cost import Cost
    from cap_pretrain.topology.hlo import Module

# Prefixes of topology names, and how libtpu should set up the chips. The two cores of a v4 chip act
# as one device, as on Cloud TPU; those of later chips always do.
CHIPS: dict[str, dict[str, str]] = {
    "v4": {"chip_config_name": "megacore"},
    "v5e": {},
    "v5p": {},
    "v6e": {},
}

# Slices of these chips are 2D tori of at most `LARGEST_PLANE` chips (16 x 16; Google Cloud
# documentation, "TPU v5e" and "TPU v6e"). Slices of other chips are 3D tori.
PLANES = ("v5e", "v6e")
LARGEST_PLANE = 256

# The einsums of attention, and its softmax
ATTENTION = re.compile(r"BTNH|BSNH|BNTS|bthd|bhts|/vmap\(\)/")

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REQUIRED = re.compile(
    r"memory required[^(]*\(([\d.]+)([KMGT]?)\) exceeds[^(]*\(([\d.]+)([KMGT]?)\)"
)
_USED = re.compile(r"Used ([\d.]+)([KMGT]?)i?B? of ([\d.]+)([KMGT]?)i?B? hbm")


class TPU(Compiler):
    """The TPU compiler."""

    device = "chip"
    kinds = tuple(CHIPS)

    def environment(self) -> dict[str, str]:
        """Return variables that keep libtpu from looking for TPUs."""
        return {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",  # do not ask a metadata server for the machine type
            "TPU_WORKER_HOSTNAMES": "localhost",  # these two only silence warnings
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            # Nothing is loaded onto a TPU, so other processes may compile at the same time.
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }

    def open(self, name: str, slices: int = 1) -> Sequence["jax.Device"]:
        """Return the devices of `slices` slices of a topology like "v5e:16x16"."""
        if importlib.util.find_spec("libtpu") is None:
            raise UserError("libtpu, the TPU compiler, is not installed: pip install -e '.[tpu]'")
        from jax.experimental import topologies

        kind, _, shape = name.partition(":")
        if not re.fullmatch(r"\d+(x\d+)+", shape):
            raise UserError(f"--topology: {name!r} lacks a shape; write it as {kind}:4x4.")
        kwargs: dict[str, Any] = CHIPS[kind] | ({"num_slices": slices} if slices > 1 else {})
        try:
            return topologies.get_topology_desc(name, "tpu", **kwargs).devices
        except Exception as e:  # JaxRuntimeError or others, depending on libtpu
            reason = str(e).splitlines()[0].partition(": ")[2] or str(e)
            raise UserError(f"--topology: {name!r} is not possible: {reason}") from e

    def memory_limit(self, device: "jax.Device") -> int:
        """Return the bytes of HBM that the compiler may use."""
        return hbm_limit(device)

    def out_of_memory(self, error: Exception) -> OutOfMemoryError | None:
        """Parse the compiler's message about memory; None if the error is another one."""
        return out_of_memory(error)

    def choices(
        self, config: "ConfigDict", vocab_size: int, devices: Sequence["jax.Device"]
    ) -> dict[str, Any]:
        """Return the choices of a run on TPUs."""
        del config, vocab_size, devices
        return {
            "dtype": "bfloat16",
            "model.attention": "keep",
            "model.remat": "lean",
            "model.unroll": 2**31 - 1,  # all layers; the largest value that `validate` accepts
        }

    def measure(self, module: "Module", chip: "Chip", devices: Sequence["jax.Device"]) -> "Cost":
        """Return the cost by the compiler's own estimates of cycles."""
        from cap_pretrain.topology import cycles

        return cycles.measure(module, chip, len(devices))

    def operations(self, cost: "Cost") -> dict[str, Any]:
        """Return the cycles, the clock and the seconds that follow."""
        what = "operations: the compiler's cycles"
        return {
            "cycles": cost.work,
            "clock": cost.rate,
            "operations": {what: cost.work / cost.rate},
        }

    def kind(self, kernel: str, name: str) -> str:
        """Return the kind of an operation by its opcode and where it comes from."""
        if kernel in ("copy", "transpose", "reshape", "bitcast-convert"):
            return "layout"
        if ATTENTION.search(name):
            return "attention"
        if "dot_general" in name or "conv_general" in name:
            return "products"
        return "other"

    def of_size(self, topology: str, devices: int) -> tuple[str, int]:
        """Return topology and number of slices for so many chips of a kind."""
        return slice_of(topology.partition(":")[0], devices)


@functools.cache
def hbm_limit(device: "jax.Device") -> int:
    """Return the bytes of HBM that the compiler may use, from its message about a huge array."""
    import jax
    import jax.numpy as jnp

    alone = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((2**20, 2**22), jnp.int8, sharding=alone)  # 4 TiB
    try:
        jax.jit(lambda x: x + 1).lower(x).compile()
    except Exception as e:
        if error := out_of_memory(e):
            return error.limit
        raise
    raise AssertionError("the compiler accepted an array of 4 TiB")


def out_of_memory(error: Exception) -> OutOfMemoryError | None:
    """Parse the compiler's message about memory; None if the error is another one."""
    for pattern in (_REQUIRED, _USED):
        if found := pattern.search(str(error)):
            needed, unit, limit, limit_unit = found.groups()
            return OutOfMemoryError(
                round(float(needed) * _UNITS[unit]), round(float(limit) * _UNITS[limit_unit])
            )
    return None


def slice_of(kind: str, chips: int) -> tuple[str, int]:
    """Return topology and number of slices for `chips` chips in all of a kind such as "v5e".

    Raises UserError if `chips` is not a power of two of at least 4.
    """
    if chips < 4 or chips & (chips - 1):
        raise UserError(f"--scan: {chips} chips is not a power of two of at least 4.")
    slices = max(1, chips // LARGEST_PLANE) if kind in PLANES else 1
    doublings = int(math.log2(chips // slices))
    dimensions = 2 if kind in PLANES else 3
    shape = sorted(2 ** ((doublings + extra) // dimensions) for extra in range(dimensions))
    if dimensions == 3 and doublings < 6:  # smaller than a cube of 4 x 4 x 4
        shape = {2: [2, 2, 1], 3: [2, 2, 2], 4: [2, 2, 4], 5: [2, 4, 4]}[doublings]
    return f"{kind}:{'x'.join(map(str, shape))}", slices
