"""The predicted cost of a compiled program on GPUs, by a roofline.

An operation takes the larger of its bytes over `HBM_SHARE` of the memory's bandwidth and its FLOPs
over `PEAK_SHARE` of the peak. No time is added for launching kernels. A collective within a host
sends over NVLink; between hosts, each GPU sends over the network as well, and the slower counts.
"""

from typing import NamedTuple

from cap_pretrain.telemetry.flops import Chip
from cap_pretrain.topology.cost import Cost, Kernel, Walk, sent_fraction, traffic
from cap_pretrain.topology.hlo import Module, Operation
from cap_pretrain.topology.products import ATTENTION, CUBLAS, flops_of, kernel_name

HBM_SHARE = 0.85
PEAK_SHARE = 0.75
# NVIDIA/nccl-tests on eight A100s: 230 to 250 GB/s of the links' 300, in one direction.
LINK_SHARE = 0.8

# Products of float32 run as TF32, at half of the rate of bfloat16 (A100 data sheet; XLA's default).
_FLOAT32_SHARE = 0.5


class Links(NamedTuple):
    """How the GPUs of a topology are joined: GPUs per host, and bytes/s that one GPU sends."""

    per_host: int
    nvlink: float
    network: float


def measure(module: Module, chip: Chip, devices: int, links: Links) -> Cost:
    """Return the cost of running a program once on each of `devices` GPUs."""
    return _Walk(module, chip, devices, links).computation(module.entry)


class _Walk(Walk):
    def __init__(self, module: Module, chip: Chip, devices: int, links: Links):
        assert chip.hbm_bandwidth and chip.peak
        super().__init__(module, devices, 1.0, HBM_SHARE * chip.hbm_bandwidth)
        self.peak, self.links = PEAK_SHARE * chip.peak, links

    def kernel(self, op: Operation, computation: str) -> Kernel:
        """Return the larger of the two times of an operation, in seconds."""
        if op.collective or op.opcode.endswith("-start"):
            return Kernel(op.opcode, 0.0)
        flops = flops_of(self.module, computation, op)
        name = kernel_name(op, flops)
        moved = traffic(self.module, computation, op, ("dynamic-slice", "slice", "gather"))
        if name in (CUBLAS, *ATTENTION):
            moved -= sum(a.size for a in op.results[1:] if a.dtype in ("s8", "u8"))  # workspace
        share = _FLOAT32_SHARE if op.results and op.results[0].dtype == "f32" else 1.0
        source = self.module.operation(computation, op.operands[0]) if op.operands else None
        if source and source.results and source.results[0].dtype != "f32":
            share = 1.0  # bfloat16 in, float32 out
        seconds = max(moved / self.hbm_bandwidth, flops / (share * self.peak))
        return Kernel(name, seconds, moved, flops)

    def link_seconds(self, one: Operation, holder: Operation, kind: str, size: int) -> float:
        """Return the larger of the time within the hosts and that between them.

        The GPUs of a group on one host share what they send to another.
        """
        del holder
        members = self.module.members(one, self.devices)
        sent = size * sent_fraction(kind, len(members))
        hosts = {member // self.links.per_host for member in members}
        within = len(members) / len(hosts)
        seconds = sent / (LINK_SHARE * self.links.nvlink) if within > 1 else 0.0
        if len(hosts) > 1:
            if kind.endswith("all-to-all"):  # each GPU sends directly to every other
                between = size * (1 - within / len(members))
            elif kind == "collective-permute":
                between = float(size)
            else:
                between = sent / within
            seconds = max(seconds, between / (LINK_SHARE * self.links.network))
        return seconds

    def is_blocking(self, op: Operation) -> bool:
        """Return whether the compiler made an operation synchronous."""
        return '"is_sync":true' in op.line

    def nested(self, op: Operation, pieces: list) -> tuple[str, ...]:
        """Return computations to run: branches, calls and what runs on another stream."""
        if op.opcode == "async-start" and not pieces:
            return op.runs("calls")
        return super().nested(op, pieces)
