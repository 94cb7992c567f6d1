"""What a compiled program takes on a TPU: cycles, collectives, time. All of it is predicted.

The time of the operations is the compiler's own: `estimated_cycles`, times the turns of the loops
around them, over the clock. For collectives and for copies that it starts early (between HBM and
the core's memory) it gives none, so they take their bytes over the bandwidth; of that of a chip's
links, a collective has what its rings use, two links each. Operations run one
after the other, in the order of the schedule; what is started and ended by a pair of operations
runs beside those in between, and what is not over by then is waited for. So does a collective of
which the compiler has put pieces into several operations, from the first of them to the last.
"""

import collections
import dataclasses

from cap_pretrain.telemetry.flops import Chip
from cap_pretrain.topology.hlo import COLLECTIVES, Array, Module, Operation

# What says where the results of others are, and computes nothing.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")


@dataclasses.dataclass
class Collective:
    """Collectives of one kind, in one step.

    Attributes:
      count: how many are run.
      bytes: what they take as input on one chip.
      sent: what one chip sends: in a ring of n, (n - 1) / n of an input for reduce-scatter and
        all-to-all, twice that for all-reduce, n - 1 inputs for all-gather.
      seconds: what they would take one by one.
    """

    count: int = 0
    bytes: float = 0.0
    sent: float = 0.0
    seconds: float = 0.0


@dataclasses.dataclass
class Cost:
    """What one run of a program takes on one chip.

    Attributes:
      cycles: the compiler's estimates, added up.
      seconds: until the last operation ends.
      waited: seconds of these in which the core waits for collectives ("ici") or copies ("hbm").
      cycles_of: the cycles by operation, (opcode, op_name).
      collectives: by kind.
      hbm_bytes: what operations and early copies read from HBM and write to it.
      endless: names of loops whose turns the program does not tell; they count as one turn.
    """

    cycles: float = 0.0
    seconds: float = 0.0
    waited: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    cycles_of: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    hbm_bytes: float = 0.0
    endless: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Adds what another program takes, `times` times, after this one."""
        self.cycles += times * other.cycles
        self.seconds += times * other.seconds
        self.hbm_bytes += times * other.hbm_bytes
        for mine, its in ((self.waited, other.waited), (self.cycles_of, other.cycles_of)):
            for key, value in its.items():
                mine[key] += times * value
        for kind, its in other.collectives.items():
            mine = self.collectives.setdefault(kind, Collective())
            for field in dataclasses.fields(Collective):
                value = getattr(mine, field.name) + times * getattr(its, field.name)
                setattr(mine, field.name, value)
        self.endless += other.endless


def measure(module: Module, chip: Chip, devices: int) -> Cost:
    """What one run of a program takes on a chip of these, of which there are `devices`."""
    return _Walk(module, chip, devices).computation(module.entry)


class _Walk:
    def __init__(self, module: Module, chip: Chip, devices: int):
        self.module, self.chip, self.devices = module, chip, devices

    def computation(self, name: str) -> Cost:
        cost = Cost()
        free = {"ici": 0.0, "hbm": 0.0}  # when what moves the bytes has done what it was given
        ends: dict[str, tuple[str, float]] = {}  # of what was started: who does it, and when
        pieces = {op.name: self._pieces(name, op) for op in self.module.computations[name]}
        last = {one.chain: holder for holder, held in pieces.items() for _, one in held}
        for op in self.module.computations[name]:
            if op.opcode == "while":
                turns = self.module.trips(op, name)
                if turns is None:
                    cost.endless.append(op.name)
                (body,) = op.runs("body")
                cost.add(self.computation(body), 1 if turns is None else turns)
            elif op.opcode in ("conditional", "call"):
                branches = [self.computation(c) for c in op.runs("branch", "to_apply", "calls")]
                cost.add(max(branches, key=lambda branch: branch.seconds))
            elif op.opcode.endswith("-done"):
                self._wait(cost, *ends.pop(op.operands[0] if op.operands else "", ("", 0.0)))
            elif op.opcode not in _FREE:
                begun = [one for one in pieces[op.name] if one[1].chain not in ends]
                self._run(name, op, begun, last, cost, free, ends)
                for chain in {one.chain for _, one in pieces[op.name]}:
                    if last[chain] == op.name:
                        self._wait(cost, *ends.pop(chain, ("", 0.0)))
        return cost

    @staticmethod
    def _wait(cost: Cost, by: str, end: float) -> None:
        if end > cost.seconds:
            cost.waited[by] += end - cost.seconds
            cost.seconds = end

    def _run(
        self, where: str, op: Operation, begun: list, last: dict, cost: Cost, free: dict, ends: dict
    ) -> None:
        """An operation, with the collectives that begin in it."""
        cost.cycles += op.cycles
        cost.seconds += op.cycles / self.chip.clock
        if op.cycles:
            cost.cycles_of[op.opcode, op.op_name] += op.cycles
        by, seconds = "ici", self._collectives(op, begun, cost)
        if op.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            copied = self._copied(op)
            cost.hbm_bytes += copied
            by, seconds = "hbm", copied / self.chip.hbm_bandwidth
        elif not op.collective:
            cost.hbm_bytes += traffic(self.module, where, op)
        end = cost.seconds
        if seconds:
            end = free[by] = max(end, free[by]) + seconds
        if op.opcode.endswith("-start"):
            open_ended = {op.name}  # until its -done
        else:
            open_ended = {one.chain for _, one in begun if last[one.chain] != op.name}
        ends |= dict.fromkeys(open_ended, (by, end))
        if not open_ended:
            self._wait(cost, by, end)

    def _pieces(self, where: str, op: Operation) -> list[tuple[str, Operation]]:
        """The collectives, or pieces of them, that an operation is or holds, and where they are."""
        found = [(where, op)] if op.collective else []
        for inner in op.runs("calls"):
            found += [(inner, o) for o in self.module.computations[inner] if o.collective]
        return found

    def _collectives(
        self, holder: Operation, begun: list[tuple[str, Operation]], cost: Cost
    ) -> float:
        """Counts those that begin in an operation; returns their seconds."""
        total = 0.0
        for computation, one in begun:
            size = self._taken(computation, one)
            group = self.module.groups(one, self.devices)
            # Written as an all-reduce of which a part is taken, in one fusion.
            scatters = "AllReduceScatterFusion" in holder.line
            kind = "reduce-scatter" if scatters else one.collective
            of_kind = cost.collectives.setdefault(kind, Collective())
            sent = size * sent_share(kind, group)
            seconds = sent / (self.chip.ici_bandwidth * self._links_used(holder, one, group))
            of_kind.count += 1
            of_kind.bytes += size
            of_kind.sent += sent
            of_kind.seconds += seconds
            total += seconds
        return total

    def _links_used(self, holder: Operation, one: Operation, group: int) -> float:
        """The share of a chip's links that a collective uses: in a ring one to each side.

        Where the compiler does not say in how many rings it is run, that is one, but for a
        collective of all chips, for which the compiler takes all dimensions of the wiring.
        """
        rings = holder.rings or one.rings or (self.chip.links if group == self.devices else 1)
        return min(1.0, 2 * rings / self.chip.links)

    def _taken(self, computation: str, op: Operation) -> int:
        """Bytes of an operation's inputs."""
        inputs = [self.module.operation(computation, name) for name in op.operands]
        return sum(one.size for one in inputs if one)

    @staticmethod
    def _copied(op: Operation) -> int:
        """Bytes of what is moved; the result holds that, what it is cut from and a semaphore."""
        return min((array.size for array in op.results if array.size > 4), default=0)


def traffic(module: Module, computation: str, op: Operation) -> int:
    """Bytes that an operation reads from HBM and writes to it.

    What lies in the core's own memory counts nothing, and of an array of which a fusion takes or
    replaces a slice, only that counts.
    """
    inner = [o for name in op.runs("calls") for o in module.computations[name]]
    parameters = {
        int(o.line.split("parameter(")[1].split(")")[0]): o.name
        for o in inner
        if o.opcode == "parameter"
    }
    total = sum(array.size for array in op.results if not _near(array))
    for number, name in enumerate(op.operands):
        source = module.operation(computation, name)
        if source is None or all(map(_near, source.results)):
            continue
        mine = parameters.get(number)
        users = [o for o in inner if mine in o.operands]
        first = users and all(o.operands[0] == mine for o in users)
        if first and all(o.opcode == "dynamic-slice" for o in users):
            total += sum(o.size for o in users)
        elif first and all(o.opcode == "dynamic-update-slice" for o in users):
            # The result is the same array, with the slice replaced.
            update = [module.operation(op.runs("calls")[0], o.operands[1]) for o in users]
            total += sum(o.size for o in update if o) - source.size
        else:
            total += source.size
    return max(0, total)


def _near(array: Array) -> bool:
    """Whether it lies in the core's own memory."""
    return "S(" in array.layout


def sent_share(kind: str, group: int) -> float:
    """What one chip of a group sends in a ring, relative to its input; see `Collective`.

    Source: Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication
    Operations in MPICH", sections 3 and 4.
    """
    assert kind in COLLECTIVES
    if group <= 1:
        return 0.0
    part = (group - 1) / group
    return {"all-reduce": 2 * part, "all-gather": group - 1.0, "collective-permute": 1.0}.get(
        kind, part
    )
