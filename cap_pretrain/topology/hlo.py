"""Reads the optimized HLO of a compiled program: its operations, their loops, their cost.

The text is that of `Compiled.as_text()`. A computation is a list of operations in the order in
which a TPU runs them (`is_scheduled=true`); fusions, loops and conditionals name the computations
they run. The TPU compiler writes `estimated_cycles`, its own estimate, to the operations that keep
the core busy; a fusion's are those of all that is inside.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from cap_pretrain.errors import UserError

# Bytes of an element, by the names of XLA's `PrimitiveType` (xla_data.proto).
_WIDTHS = {
    **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2", "f8e4m3", "f8e4m3b11fnuz"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
    "s4": 0.5,
    "u4": 0.5,
}

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ([a-z][a-z\d\-]*)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), "
    r"false_computation=%?([\w.\-]+))"
)
_TRIPS = re.compile(r'known_trip_count[\\"]*:\{[\\"]*n[\\"]*:[\\"]*(\d+)')
_CHAIN = re.compile(r'chain_id="(\d+)"')
_RINGS = re.compile(r"Strategy\w+\{colors:(\d+)")
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_GROUPS = re.compile(r"replica_groups=(\S+?),? ")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
# mesh['a'=8,'b'=4], device_ids=([4,8]T(1,0)) {'a'}; of a part of an axis it is {'a':(2)4}.
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:[^()]|\([^()]*\))*\))?\s*\{([^}]*)\}"
)

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an operation's result.

    Attributes:
      dtype: as HLO has it, such as "bf16".
      shape: its dimensions, on one device.
      layout: what stands in braces; `S(1)` in it means that it lies in the core's own memory.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Bytes, without padding."""
        return math.ceil(math.prod(self.shape) * _WIDTHS.get(self.dtype, 0))


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      opcode: such as "fusion"; that of an asynchronous pair ends in -start and -done.
      results: the arrays of its result, those of a tuple one after the other.
      operands: names.
      called: role ("calls", "body", …, "branch") and name of the computations it runs.
      cycles: the compiler's estimate for one execution, or 0 where it has none.
      op_name: the path of the operation in the traced program.
      line: the text, for what is looked at rarely.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    called: tuple[tuple[str, str], ...]
    cycles: int
    op_name: str
    line: str = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(array.size for array in self.results)

    @property
    def collective(self) -> str | None:
        """Which of COLLECTIVES it begins, if any."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def chain(self) -> str:
        """What pieces of one collective have in common, and nothing else.

        Channels do not tell: clones of an operation, as of each layer, share theirs.
        """
        found = _CHAIN.search(self.line)
        return f"chain {found[1]}" if found else f"chain of {self.name} alone"

    @property
    def rings(self) -> int | None:
        """In how many rings at a time a collective is run, if the compiler says so."""
        found = _RINGS.search(self.line)
        return int(found[1]) if found else None

    def runs(self, *roles: str) -> tuple[str, ...]:
        """Names of the computations it runs in these roles."""
        return tuple(name for role, name in self.called if role in roles)


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, each its operations in order, and which one is the entry."""

    computations: dict[str, tuple[Operation, ...]]
    entry: str

    @functools.cached_property
    def _by_name(self) -> dict[str, dict[str, Operation]]:
        return {c: {op.name: op for op in ops} for c, ops in self.computations.items()}

    def operation(self, computation: str, name: str) -> Operation | None:
        """The operation of that name, or None."""
        return self._by_name.get(computation, {}).get(name)

    def trips(self, loop: Operation, computation: str) -> int | None:
        """How often the body of a `while` runs; None if the program does not say.

        The compiler may have noted it; else it is read off a loop that counts: the condition
        compares an element of the carried tuple with a constant, the initial tuple holds a constant
        there, and the body adds a constant to it.

        Args:
          loop: the operation.
          computation: where it stands.
        """
        if noted := _TRIPS.search(loop.line):
            return int(noted[1])
        (condition,), (body,) = loop.runs("condition"), loop.runs("body")
        compared = self._comparison(condition)
        if not compared:
            return None
        index, limit, direction = compared
        start = self._constant(computation, self._element(computation, loop.operands[0], index))
        step = self._step(body, index)
        if start is None or not step:
            return None
        if direction in ("LE", "GE"):
            limit += 1 if direction == "LE" else -1
        return max(0, math.ceil((limit - start) / step))

    def _comparison(self, condition: str) -> tuple[int, int, str] | None:
        """Which element of the carried tuple is compared with which number, and how."""
        flipped = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}
        for where, op in self._with_fused(condition):
            if op.opcode != "compare":
                continue
            direction = re.search(r"direction=(\w+)", op.line)[1]
            sides = [self._resolve(*where, name) for name in op.operands]
            for (one, other), turned in ((sides, False), (reversed(sides), True)):
                limit, index = other.get("constant"), one.get("index")
                if limit is not None and index is not None:
                    return index, limit, flipped[direction] if turned else direction
        return None

    def _with_fused(self, computation: str) -> Iterator[tuple[tuple, Operation]]:
        """Operations of a computation and of what it calls, with where they stand."""
        for op in self.computations[computation]:
            yield (computation, None, None), op
            for inner in op.runs("calls"):
                for fused in self.computations[inner]:
                    yield (inner, op, computation), fused

    def _resolve(self, computation: str, caller, outside, name: str) -> dict[str, int]:
        """What a scalar is: {"constant": n}, {"index": i} of the carried tuple, or nothing."""
        op = self.operation(computation, name)
        while op and op.opcode in ("copy", "bitcast", "convert"):
            op = self.operation(computation, op.operands[0])
        if not op:
            return {}
        if op.opcode == "constant":
            value = re.search(r"constant\((-?\d+)\)", op.line)
            return {"constant": int(value[1])} if value else {}
        if op.opcode == "get-tuple-element":
            return {"index": _index(op)}
        if op.opcode == "parameter" and caller is not None:
            return self._resolve(outside, None, None, caller.operands[_index(op)])
        return {}

    def _element(self, computation: str, name: str, index: int) -> str:
        """Name of an element of a tuple."""
        op = self.operation(computation, name)
        return op.operands[index] if op and op.opcode == "tuple" else ""

    def _constant(self, computation: str, name: str) -> int | None:
        return self._resolve(computation, None, None, name).get("constant")

    def _step(self, body: str, index: int) -> int | None:
        """What the body adds to an element of the carried tuple; None if something else."""
        root = self.computations[body][-1]
        op = self.operation(body, self._element(body, root.name, index))
        where = (body, None, None)
        while op and op.opcode in ("copy", "fusion"):
            if op.opcode == "copy":
                op = self.operation(body, op.operands[0])
                continue
            (inner,) = op.runs("calls")
            where, op = (inner, op, body), self.computations[inner][-1]
        if not op or op.opcode not in ("add", "subtract"):
            return None
        sides = [self._resolve(*where, name) for name in op.operands]
        if {"index": index} not in sides:
            return None
        added = [side["constant"] for side in sides if "constant" in side]
        return (added[0] if op.opcode == "add" else -added[0]) if added else None

    def groups(self, op: Operation, devices: int) -> int:
        """How many devices take part together in a collective.

        Raises:
          UserError: the program says so in a way that is not known here.
        """
        if found := _IOTA_GROUPS.search(op.line):
            return int(found[2])
        if found := _MESH_GROUPS.search(op.line):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
            axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
            return math.prod(int(part or sizes[axis]) for axis, part in axes)
        if found := _LISTED_GROUPS.search(op.line):
            return len(found[1].split(","))
        if (told := _GROUPS.search(op.line)) and told[1] != "{}":
            raise UserError(
                f"Replica groups of the compiler's program are not understood: {told[1]}"
            )
        return devices


def _index(op: Operation) -> int:
    """That of a get-tuple-element or of a parameter."""
    found = re.search(r"index=(\d+)", op.line) if op.opcode != "parameter" else None
    return int(found[1]) if found else int(re.search(r"parameter\((\d+)\)", op.line)[1])


def parse(text: str) -> Module:
    """Reads the text of a program.

    Raises:
      UserError: it is no HLO.
    """
    computations: dict[str, tuple[Operation, ...]] = {}
    entry, name, operations = "", "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name, operations = head[2], []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = tuple(operations)
        elif name and (found := _OPERATION.match(line)):
            operations.append(_operation(found[2], line[found.end() :]))
    if not entry:
        raise UserError("The compiler's program has no ENTRY computation: this is no HLO text.")
    return Module(computations, entry)


def _operation(name: str, line: str) -> Operation:
    opcode = _OPCODE.search(f" {line}" if line.startswith("(") else line)
    # The result's layout holds words before parentheses too, as T(8,128): upper case, so no match.
    begin = opcode.end() - (1 if line.startswith("(") else 0)
    arguments = line[begin : _closing(line, begin)]
    after = line[begin + len(arguments) :]
    cycles = _CYCLES.search(after)
    op_name = _OP_NAME.search(after)
    called = [(role, computation) for role, computation in _CALLED.findall(after)]
    if branches := _BRANCHES.search(after):
        listed = branches[1].split(",") if branches[1] else branches.groups()[1:]
        called += [("branch", branch.strip().lstrip("%")) for branch in listed]
    return Operation(
        name=name,
        opcode=opcode[1],
        results=tuple(
            Array(dtype, tuple(map(int, filter(None, dims.split(",")))), layout)
            for dtype, dims, layout in _ARRAY.findall(line[: opcode.start() + 1])
        ),
        operands=tuple(_NAME.findall(arguments)),
        called=tuple(called),
        cycles=int(cycles[1]) if cycles else 0,
        op_name=op_name[1] if op_name else "",
        line=line,
    )


def _closing(text: str, begin: int) -> int:
    """Where the parenthesis closes that is open at `begin`."""
    depth = 1
    for place in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)
