"""The compilers for devices that this machine lacks, by names of topologies and by devices."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.topology.compiler import Compiler
from cap_pretrain.topology.gpu import GPU
from cap_pretrain.topology.tpu import TPU

if TYPE_CHECKING:
    import jax


@functools.cache
def _compilers() -> tuple[Compiler, ...]:
    return TPU(), GPU()


def compiler_of(name: str) -> Compiler:
    """Return the compiler for a topology such as "v5e:4x4" or "h100:8"; may raise UserError."""
    kind = name.partition(":")[0]
    compilers = _compilers()
    for compiler in compilers:
        if kind in compiler.kinds:
            return compiler
    kinds = [kind for compiler in compilers for kind in compiler.kinds]
    raise UserError(
        f"--topology: no chip {kind!r} in {name!r}, only {', '.join(kinds)}."
        f"{did_you_mean(kind, kinds)}"
    )


def compiler_for(devices: Sequence["jax.Device"]) -> Compiler:
    """Return the compiler that `devices` belong to."""
    tpu, gpu = _compilers()
    return tpu if devices[0].platform == "tpu" else gpu


def open_topology(name: str, slices: int = 1) -> Sequence["jax.Device"]:
    """Return the devices of `slices` slices of a topology; may raise UserError."""
    return compiler_of(name).open(name, slices)
