"""The predicted cost of a compiled program: work, collectives and time.

`Walk` goes through a program; a compiler's own walk says how long an operation takes (`cycles` for
TPUs, `roofline` for GPUs). That is multiplied by the iterations of the loops around it. Collectives
and copies that the compiler starts early take their bytes over the bandwidth.

Operations run sequentially in the order of the schedule. What a pair of operations starts and ends
runs beside those in between, and the core waits for what has not ended by then. The same holds for
a collective that the compiler has split over several operations, from the first to the last.
"""

import abc
import collections
import dataclasses
from typing import NamedTuple

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

    `work` is what operations take one by one; there are `rate` units of it in a second: cycles on
    TPUs, seconds on GPUs. `waited` are the seconds in which the core waits for collectives ("ici")
    or copies ("hbm"). `work_of` is by operation, (kernel, op_name), `collectives` by kind, `count`
    and `bytes_of` by kernel; see `Kernel`. `endless` loops, whose number of iterations is unknown,
    count as one.
    """

    rate: float = 1.0
    work: float = 0.0
    seconds: float = 0.0  # until the last operation ends
    waited: dict[str, float] = dataclasses.field(default_factory=_totals)
    work_of: dict[tuple[str, str], float] = dataclasses.field(default_factory=_totals)
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    hbm_bytes: float = 0.0  # that operations and early copies read from and write to HBM
    flops: float = 0.0  # of the kernels, as far as the walk counts them
    count: dict[str, float] = dataclasses.field(default_factory=_totals)
    bytes_of: dict[str, float] = dataclasses.field(default_factory=_totals)
    endless: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Cost", times: int = 1) -> None:
        """Add the cost of running another program `times` times after this one."""
        for name in ("work", "seconds", "hbm_bytes", "flops"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name in ("waited", "work_of", "count", "bytes_of"):
            for key, value in getattr(other, name).items():
                getattr(self, name)[key] += times * value
        for kind, theirs in other.collectives.items():
            mine = self.collectives.setdefault(kind, Collective())
            for field in dataclasses.fields(Collective):
                value = getattr(mine, field.name) + times * getattr(theirs, field.name)
                setattr(mine, field.name, value)
        self.endless += other.endless


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
    cost: Cost
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


class Kernel(NamedTuple):
    """One operation as a device runs it: its name, and what one execution takes."""

    name: str  # the opcode, or what a library calls it
    work: float  # in units of `Cost.work`
    bytes: float = 0.0  # read from and written to HBM
    flops: float = 0.0


class Walk(abc.ABC):
    """Walks through the computations of a program and adds up their cost.

    `rate` is as in `Cost`, and `hbm_bandwidth` in bytes/s.
    """

    def __init__(self, module: Module, devices: int, rate: float, hbm_bandwidth: float):
        self.module, self.devices = module, devices
        self.rate, self.hbm_bandwidth = rate, hbm_bandwidth

    @abc.abstractmethod
    def kernel(self, op: Operation, computation: str) -> Kernel:
        """Return what an operation takes, besides the collectives in it."""

    @abc.abstractmethod
    def link_seconds(self, one: Operation, holder: Operation, kind: str, size: int) -> float:
        """Return how long a collective of a kind takes, with `size` bytes of input on one chip."""

    def is_blocking(self, op: Operation) -> bool:  # noqa: ARG002
        """Return whether the core waits at once for what an operation starts."""
        return False

    def nested(self, op: Operation, pieces: list[_Piece]) -> tuple[str, ...]:  # noqa: ARG002
        """Return the computations of which an operation runs one, the most expensive counts."""
        if op.opcode in ("conditional", "call"):
            return op.runs("branch", "to_apply", "calls")
        return ()

    def computation(self, name: str) -> Cost:
        """Return the cost of running a computation once."""
        operations = self.module.computations[name]
        pieces = {op.name: self._pieces(name, op) for op in operations}
        last = {piece.chain: holder for holder, held in pieces.items() for _, piece in held}
        timeline = _Timeline(name, pieces, last, Cost(self.rate))
        cost = timeline.cost
        for op in operations:
            if op.opcode == "while":
                trips = self.module.trips(op, name)
                if trips is None:
                    cost.endless.append(op.name)
                (body,) = op.runs("body")
                cost.add(self.computation(body), 1 if trips is None else trips)
            elif nested := self.nested(op, pieces[op.name]):
                branches = [self.computation(c) for c in nested]
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
        kernel = self.kernel(op, timeline.name)
        cost.work += kernel.work
        cost.seconds += kernel.work / self.rate
        cost.flops += kernel.flops
        if kernel.work:
            cost.work_of[kernel.name, op.op_name] += kernel.work
            cost.count[kernel.name] += 1
            cost.bytes_of[kernel.name] += kernel.bytes
        cause, seconds = "ici", self._collectives(op, started, cost)
        if op.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
            copied = self._copied(op)
            cost.hbm_bytes += copied
            cause, seconds = "hbm", copied / self.hbm_bandwidth
        else:
            cost.hbm_bytes += kernel.bytes
        end = cost.seconds
        if seconds:
            end = timeline.free[cause] = max(end, timeline.free[cause]) + seconds
        if op.opcode.endswith("-start") and not self.is_blocking(op):
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
            # The compiler writes it as an all-reduce and a slice of the result, in one fusion.
            scatters = "AllReduceScatterFusion" in holder.line
            kind = "reduce-scatter" if scatters else one.collective
            of_kind = cost.collectives.setdefault(kind, Collective())
            sent = size * sent_fraction(kind, self.module.groups(one, self.devices))
            seconds = self.link_seconds(one, holder, kind, size)
            of_kind.count += 1
            of_kind.bytes += size
            of_kind.sent += sent
            of_kind.seconds += seconds
            total += seconds
        return total

    def _input_bytes(self, computation: str, op: Operation) -> int:
        inputs = [self.module.operation(computation, name) for name in op.operands]
        return sum(one.size for one in inputs if one)

    @staticmethod
    def _copied(op: Operation) -> int:
        """Return the bytes a copy moves; its result holds the copy, its source and a semaphore."""
        return min((array.size for array in op.results if array.size > 4), default=0)


def traffic(
    module: Module, computation: str, op: Operation, slices: tuple[str, ...] = ("dynamic-slice",)
) -> int:
    """Return the bytes that an operation reads from and writes to HBM, not the core's own memory.

    If a fusion reads or replaces a slice of an array, only the slice counts; `slices` are the
    opcodes of such reads.
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
        if first and all(o.opcode in slices for o in users):
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
