"""The predicted cost of a compiled program on a TPU, by the cycles that its compiler estimates.

The time of an operation is the compiler's `estimated_cycles` over the clock. The compiler gives no
estimate for collectives and for copies that it starts early (between HBM and the core's memory), so
these take their bytes over the bandwidth. Of the bandwidth of a chip's links, a collective gets
what its rings use, two links each.
"""

from cap_pretrain.telemetry.flops import Chip
from cap_pretrain.topology.cost import Cost, Kernel, Walk, sent_fraction, traffic
from cap_pretrain.topology.hlo import Module, Operation


def measure(module: Module, chip: Chip, devices: int) -> Cost:
    """Return the cost of running a program once on each of `devices` chips of known performance."""
    return _Walk(module, chip, devices).computation(module.entry)


class _Walk(Walk):
    def __init__(self, module: Module, chip: Chip, devices: int):
        assert chip.clock and chip.hbm_bandwidth and chip.ici_bandwidth and chip.links
        super().__init__(module, devices, chip.clock, chip.hbm_bandwidth)
        self.links, self.ici_bandwidth = chip.links, chip.ici_bandwidth

    def kernel(self, op: Operation, computation: str) -> Kernel:
        """Return the cycles of an operation."""
        moved = 0 if op.collective else traffic(self.module, computation, op)
        return Kernel(op.opcode, op.cycles, moved)

    def link_seconds(self, one: Operation, holder: Operation, kind: str, size: int) -> float:
        """Return the bytes that a chip sends over the bandwidth of the links that are used."""
        group = self.module.groups(one, self.devices)
        used = self._links_used(holder, one, group)
        return size * sent_fraction(kind, group) / (self.ici_bandwidth * used)

    def _links_used(self, holder: Operation, one: Operation, group: int) -> float:
        """Return the fraction of a chip's links that a collective uses: two links per ring.

        If the compiler does not state the number of rings, it is one, except for a collective of
        all chips: for these the compiler uses all dimensions of the wiring.
        """
        rings = holder.rings or one.rings or (self.links if group == self.devices else 1)
        return min(1.0, 2 * rings / self.links)
