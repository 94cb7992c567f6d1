"""The predicted cost of a compiled program on a TPU: cycles, collectives and time.

The time of an operation is the compiler's `estimated_cycles`, times the iterations of the loops
around it, over the clock. The compiler gives no estimate for collectives and for copies that it
starts early (between HBM and the core's memory), so these take their bytes over the bandwidth. Of
the bandwidth of a chip's links, a collective gets what its rings use, two links each.

Operations run sequentially in the order of the schedule. What a pair of operations starts and ends
runs beside those in between, and the core waits for what has not ended by then. The same holds for
a collective that the compiler has split over several operations, from the first to the last.
"""

import collections
import dataclasses

from cap_pretrain.telemetry.flops import Chip
from cap_pretrain.topology.hlo import COLLECTIVES, Array, Module, Operation

# Operations that only name the results of others and compute nothing.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all")


@dataclasses.dataclass
class Collective:
    """The collectives of one kind in one step.

    `bytes` are their input on one chip. `sent` are the bytes that one chip sends: in a ring of n,
    (n - 1) / n of the input for reduce-scatter and all-to-all, twice that for all-reduce, n - 1
    inputs for all-gather. `seconds` is their total time if run one by one.
    """

    count: int = 0
    bytes: float = 0.0
    sent: float = 0.0
    seconds: float = 0.0


def _totals() -> collections.defaultdict:
    return collections.defaultdict(float)


@dataclasses.dataclass
class Cost:
    """The predicted cost of running a program once on one chip.

    `waited` are the seconds in which the core waits for collectives ("ici") or copies ("hbm").
    `cycles_of` is by operation, (opcode, op_name), and `collectives` by kind. `endless` loops,
    whose number of iterations is unknown, count as one.
    """

    cycles: float = 0.0  # the sum of the compiler's estimates
    seconds: float = 0.0  # until the last operation ends
    waited: dict[str, float] = dataclasses.field(default_factory=_totals)
    cycles_of: dict[tuple[str, str], float] = dataclasses.field(default_factory=_totals)
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    hbm_bytes: float = 0.0  # that operations and early copies read from and write to HBM
    endless: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Add the cost of running another program `times` times after this one."""
        self.cycles += times * other.cycles
        self.seconds += times * other.seconds
        self.hbm_bytes += times * other.hbm_bytes
        for cause, seconds in other.waited.items():
            self.waited[cause] += times * seconds
        for operation, cycles in other.cycles_of.items():
            self.cycles_of[operation] += times * cycles
        for kind, theirs in other.collectives.items():
            mine = self.collectives.setdefault(kind, Collective())
            for field in dataclasses.fields(Collective):
                value = getattr(mine, field.name) + times * getattr(theirs, field.name)
                setattr(mine, field.name, value)
        self.endless += other.endless


def measure(module: Module, chip: Chip, devices: int) -> Cost:
    """Return the cost of running a program once on each of `devices` chips of known performance."""
    return _Walk(module, chip, devices).computation(module.entry)


# A collective, or a piece of one, and the computation that contains it.
_Piece = tuple[str, Operation]


@dataclasses.dataclass
class _Timeline:
    """The state of walking through one computation.

    `pieces` are collectives, or pieces of them, by the operation that holds them; `last` is the
    operation with the last piece, by chain; `free` when the links ("ici") and HBM copies ("hbm")
    become free; `ends` the cause and end of what was started, by operation or chain.
    """

    name: str
    pieces: dict[str, list[_Piece]]
    last: dict[str, str]
    cost: Cost = dataclasses.field(default_factory=Cost)
    free: dict[str, float] = dataclasses.field(default_factory=lambda: {"ici": 0.0, "hbm": 0.0})
    ends: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)

    def wait(self, cause: str, end: float) -> None:
        """Let the core wait until the time `end`."""
        if end > self.cost.seconds:
            self.cost.waited[cause] += end - self.cost.seconds
            self.cost.seconds = end

    def wait_for(self, key: str) -> None:
        """Let the core wait for what was started under `key`, if anything."""
        self.wait(*self.ends.pop(key, ("", 0.0)))


class _Walk:
    """Walks through the computations of a program and adds up their cost."""

    def __init__(self, module: Module, chip: Chip, devices: int):
        assert chip.clock and chip.hbm_bandwidth and chip.ici_bandwidth and chip.links
        self.module, self.devices = module, devices
        self.clock, self.links = chip.clock, chip.links
        self.hbm_bandwidth, self.ici_bandwidth = chip.hbm_bandwidth, chip.ici_bandwidth

    def computation(self, name: str) -> Cost:
        """Return the cost of running a computation once."""
        operations = self.module.computations[name]
        pieces = {op.name: self._pieces(name, op) for op in operations}
        last = {piece.chain: holder for holder, held in pieces.items() for _, piece in held}
        timeline = _Timeline(name, pieces, last)
        cost = timeline.cost
        for op in operations:
            if op.opcode == "while":
                trips = self.module.trips(op, name)
                if trips is None:
                    cost.endless.append(op.name)
                (body,) = op.runs("body")
                cost.add(self.computation(body), 1 if trips is None else trips)
            elif op.opcode in ("conditional", "call"):
                branches = [self.computation(c) for c in op.runs("branch", "to_apply", "calls")]
                cost.add(max(branches, key=lambda branch: branch.seconds))
            elif op.opcode.endswith("-done"):
                timeline.wait_for(op.operands[0] if op.operands else "")
            elif op.opcode not in _FREE:
                self._run(op, timeline)
                for chain in {piece.chain for _, piece in pieces[op.name]}:
                    if last[chain] == op.name:
                        timeline.wait_for(chain)
        return cost

    def _run(self, op: Operation, timeline: _Timeline) -> None:
        """Add the cost of an operation and of the collectives that start in it."""
        cost = timeline.cost
        started = [
            piece for piece in timeline.pieces[op.name] if piece[1].chain not in timeline.ends
        ]
        cost.cycles += op.cycles
        cost.seconds += op.cycles / self.clock
        if op.cycles:
            cost.cycles_of[op.opcode, op.op_name] += op.cycles
        cause, seconds = "ici", self._collectives(op, started, cost)
        if op.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            copied = self._copied(op)
            cost.hbm_bytes += copied
            cause, seconds = "hbm", copied / self.hbm_bandwidth
        elif not op.collective:
            cost.hbm_bytes += traffic(self.module, timeline.name, op)
        end = cost.seconds
        if seconds:
            end = timeline.free[cause] = max(end, timeline.free[cause]) + seconds
        if op.opcode.endswith("-start"):
            open_ended = {op.name}  # until its -done
        else:
            open_ended = {
                piece.chain for _, piece in started if timeline.last[piece.chain] != op.name
            }
        timeline.ends |= dict.fromkeys(open_ended, (cause, end))
        if not open_ended:
            timeline.wait(cause, end)

    def _pieces(self, computation: str, op: Operation) -> list[_Piece]:
        """Return the collectives, or pieces of them, that an operation is or holds."""
        found = [(computation, op)] if op.collective else []
        for inner in op.runs("calls"):
            found += [(inner, o) for o in self.module.computations[inner] if o.collective]
        return found

    def _collectives(self, holder: Operation, started: list[_Piece], cost: Cost) -> float:
        """Count the collectives that start in an operation; return their seconds."""
        total = 0.0
        for computation, one in started:
            assert one.collective
            size = self._input_bytes(computation, one)
            group = self.module.groups(one, self.devices)
            # The compiler writes it as an all-reduce and a slice of the result, in one fusion.
            scatters = "AllReduceScatterFusion" in holder.line
            kind = "reduce-scatter" if scatters else one.collective
            of_kind = cost.collectives.setdefault(kind, Collective())
            sent = size * sent_fraction(kind, group)
            seconds = sent / (self.ici_bandwidth * self._links_used(holder, one, group))
            of_kind.count += 1
            of_kind.bytes += size
            of_kind.sent += sent
            of_kind.seconds += seconds
            total += seconds
        return total

    def _links_used(self, holder: Operation, one: Operation, group: int) -> float:
        """Return the fraction of a chip's links that a collective uses: two links per ring.

        If the compiler does not state the number of rings, it is one, except for a collective of
        all chips: for these the compiler uses all dimensions of the wiring.
        """
        rings = holder.rings or one.rings or (self.links if group == self.devices else 1)
        return min(1.0, 2 * rings / self.links)

    def _input_bytes(self, computation: str, op: Operation) -> int:
        inputs = [self.module.operation(computation, name) for name in op.operands]
        return sum(one.size for one in inputs if one)

    @staticmethod
    def _copied(op: Operation) -> int:
        """Return the bytes a copy moves; its result holds the copy, its source and a semaphore."""
        return min((array.size for array in op.results if array.size > 4), default=0)


def traffic(module: Module, computation: str, op: Operation) -> int:
    """Return the bytes that an operation reads from and writes to HBM, not the core's own memory.

    If a fusion reads or replaces a slice of an array, only the slice counts.
    """
    inner = [o for name in op.runs("calls") for o in module.computations[name]]
    parameters = {
        int(o.line.split("parameter(")[1].split(")")[0]): o.name
        for o in inner
        if o.opcode == "parameter"
    }
    total = sum(array.size for array in op.results if not _is_in_core_memory(array))
    for number, name in enumerate(op.operands):
        source = module.operation(computation, name)
        if source is None or all(map(_is_in_core_memory, source.results)):
            continue
        parameter = parameters.get(number)
        users = [o for o in inner if parameter in o.operands]
        first = users and all(o.operands[0] == parameter for o in users)
        if first and all(o.opcode == "dynamic-slice" for o in users):
            total += sum(o.size for o in users)
        elif first and all(o.opcode == "dynamic-update-slice" for o in users):
            # The result is the same array, with the slice replaced.
            updates = [module.operation(op.runs("calls")[0], o.operands[1]) for o in users]
            total += sum(o.size for o in updates if o) - source.size
        else:
            total += source.size
    return max(0, total)


def _is_in_core_memory(array: Array) -> bool:
    """Return whether an array lies in the core's own memory instead of HBM."""
    return "S(" in array.layout


def sent_fraction(kind: str, group: int) -> float:
    """Return the bytes that one chip of a ring sends, relative to its input; see `Collective`.

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
