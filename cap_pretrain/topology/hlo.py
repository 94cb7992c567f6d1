"""Parsing the optimized HLO of a compiled program: its operations, loops and estimated cycles.

The text is that of `Compiled.as_text()`. A computation is a list of operations in the order in
which a device runs them (`is_scheduled=true`). Fusions, loops and conditionals name the
computations they run. The TPU compiler annotates the operations that keep the core busy with its
own estimate, `estimated_cycles`; that of a fusion covers everything inside it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cap_pretrain.errors import UserError

# Bytes per element, by the names of XLA's `PrimitiveType` (xla_data.proto).
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
# mesh['a'=8,'b'=4], device_ids=([4,8]T(1,0)) {'a'}; a part of an axis is written {'a':(2)4}.
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:[^()]|\([^()]*\))*\))?\s*\{([^}]*)\}"
)
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")

COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an operation's result, as on one device; `dtype` is the name in HLO, as "bf16".

    `S(1)` in `layout`, the text in braces, means that the array lies in the core's own memory.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """The bytes without padding."""
        return math.ceil(math.prod(self.shape) * _WIDTHS.get(self.dtype, 0))


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a computation; `line` is its text, for properties that are rarely needed.

    `opcode` is such as "fusion"; those of an asynchronous pair end in -start and -done. The roles
    in `called` are "calls", "body", …, "branch".
    """

    name: str  # without the percent sign
    opcode: str
    results: tuple[Array, ...]  # the arrays of its result, a tuple flattened
    operands: tuple[str, ...]  # their names
    called: tuple[tuple[str, str], ...]  # (role, name) of the computations it runs
    cycles: int  # the compiler's estimate for one execution, or 0 if there is none
    op_name: str  # its path in the traced program
    line: str = dataclasses.field(repr=False)

    @property
    def size(self) -> int:
        """The bytes of the result."""
        return sum(array.size for array in self.results)

    @property
    def collective(self) -> str | None:
        """The kind of collective that it starts, one of COLLECTIVES, or None."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def chain(self) -> str:
        """An identifier shared by exactly the pieces of one collective.

        Channels do not identify it: clones of an operation, such as one per layer, share theirs.
        """
        found = _CHAIN.search(self.line)
        return f"chain {found[1]}" if found else f"chain of {self.name} alone"

    @property
    def rings(self) -> int | None:
        """The number of rings in which a collective runs, or None if the compiler does not say."""
        found = _RINGS.search(self.line)
        return int(found[1]) if found else None

    def runs(self, *roles: str) -> tuple[str, ...]:
        """Return the names of the computations that it runs in these roles."""
        return tuple(name for role, name in self.called if role in roles)


class _Scope(NamedTuple):
    """Where an operation stands: its computation and, inside a fusion, the fusion and its place."""

    computation: str
    fusion: Operation | None = None
    outside: str = ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: the operations of each computation, in order, and the name of the first to run."""

    computations: dict[str, tuple[Operation, ...]]
    entry: str

    @functools.cached_property
    def _by_name(self) -> dict[str, dict[str, Operation]]:
        return {c: {op.name: op for op in ops} for c, ops in self.computations.items()}

    def operation(self, computation: str, name: str) -> Operation | None:
        """Return the operation of that name, or None."""
        return self._by_name.get(computation, {}).get(name)

    def trips(self, loop: Operation, computation: str) -> int | None:
        """Return how often the body of a `while` runs, or None if that is unknown.

        The compiler may have noted it. Otherwise it is derived for counting loops: the condition
        compares an element of the carried tuple with a constant, the initial tuple holds a constant
        there, and the body adds a constant to it. `computation` is the one that contains the loop.
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
        """Return (element of the carried tuple, constant, direction) of a loop condition."""
        flipped = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE", "NE": "NE", "EQ": "EQ"}
        for scope, op in self._with_fused(condition):
            if op.opcode != "compare":
                continue
            direction = _search(r"direction=(\w+)", op.line)[1]
            sides = [self._resolve(scope, name) for name in op.operands]
            for (one, other), turned in ((sides, False), (reversed(sides), True)):
                limit, index = other.get("constant"), one.get("index")
                if limit is not None and index is not None:
                    return index, limit, flipped[direction] if turned else direction
        return None

    def _with_fused(self, computation: str) -> Iterator[tuple[_Scope, Operation]]:
        """Yield the operations of a computation and of its fusions, with their scopes."""
        for op in self.computations[computation]:
            yield _Scope(computation), op
            for inner in op.runs("calls"):
                for fused in self.computations[inner]:
                    yield _Scope(inner, op, computation), fused

    def _resolve(self, scope: _Scope, name: str) -> dict[str, int]:
        """Trace a scalar back to {"constant": n}, {"index": i} of the carried tuple, or {}."""
        op = self.operation(scope.computation, name)
        while op and op.opcode in ("copy", "bitcast", "convert"):
            op = self.operation(scope.computation, op.operands[0])
        if not op:
            return {}
        if op.opcode == "constant":
            value = re.search(r"constant\((-?\d+)\)", op.line)
            return {"constant": int(value[1])} if value else {}
        if op.opcode == "get-tuple-element":
            return {"index": _index(op)}
        if op.opcode == "parameter" and scope.fusion is not None:
            return self._resolve(_Scope(scope.outside), scope.fusion.operands[_index(op)])
        return {}

    def _element(self, computation: str, name: str, index: int) -> str:
        """Return the name of an element of a tuple; "" if `name` is not a tuple."""
        op = self.operation(computation, name)
        return op.operands[index] if op and op.opcode == "tuple" else ""

    def _constant(self, computation: str, name: str) -> int | None:
        """Return the value of a constant scalar, or None."""
        return self._resolve(_Scope(computation), name).get("constant")

    def _step(self, body: str, index: int) -> int | None:
        """Return the constant that a loop body adds to an element of the carried tuple, or None."""
        root = self.computations[body][-1]
        op = self.operation(body, self._element(body, root.name, index))
        scope = _Scope(body)
        while op and op.opcode in ("copy", "fusion"):
            if op.opcode == "copy":
                op = self.operation(body, op.operands[0])
                continue
            (inner,) = op.runs("calls")
            scope, op = _Scope(inner, op, body), self.computations[inner][-1]
        if not op or op.opcode not in ("add", "subtract"):
            return None
        sides = [self._resolve(scope, name) for name in op.operands]
        if {"index": index} not in sides:
            return None
        added = [side["constant"] for side in sides if "constant" in side]
        return (added[0] if op.opcode == "add" else -added[0]) if added else None

    def groups(self, op: Operation, devices: int) -> int:
        """Return the size of a collective's groups, out of all `devices`; may raise UserError."""
        if found := _IOTA_GROUPS.search(op.line):
            return int(found[2])
        if found := _MESH_GROUPS.search(op.line):
            return math.prod(n for parts in _mesh_axes(found) for n, taken in parts if taken)
        if found := _LISTED_GROUPS.search(op.line):
            return len(found[1].split(","))
        if (found := _GROUPS.search(op.line)) and found[1] != "{}":
            raise UserError(f"the compiler's replica groups are not understood: {found[1]}")
        return devices

    def members(self, op: Operation, devices: int) -> tuple[int, ...]:
        """Return one of a collective's groups, by the positions of its members among `devices`."""
        if found := _IOTA_GROUPS.search(op.line):
            order = _order(op.line[found.end() :], devices)
            return tuple(order.reshape(int(found[1]), int(found[2]))[0].tolist())
        if found := _MESH_GROUPS.search(op.line):
            parts = [part for axis in _mesh_axes(found) for part in axis]
            order = _order(found[0].partition("device_ids=(")[2], devices)
            within = tuple(slice(None) if taken else 0 for _, taken in parts)
            return tuple(order.reshape([n for n, _ in parts])[within].ravel().tolist())
        if found := _LISTED_GROUPS.search(op.line):
            return tuple(map(int, found[1].split(",")))
        return tuple(range(self.groups(op, devices)))


def _mesh_axes(groups: re.Match) -> list[list[tuple[int, bool]]]:
    """Return how each axis of a mesh is split: the sizes of its parts, and if groups span them."""
    taken: dict[str, list[tuple[int, int]]] = {}
    sizes = [(axis, int(n)) for axis, n in re.findall(r"'(\w+)'=(\d+)", groups[1])]
    for axis, before, n in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", groups[2]):
        taken.setdefault(axis, []).append((int(before or 1), int(n or dict(sizes)[axis])))
    axes = []
    for axis, size in sizes:
        parts, done = [], 1
        for before, n in sorted(taken.get(axis, [])):
            parts += [(before // done, False), (n, True)]
            done = before * n
        axes.append([*parts, (size // done, False)])
    return axes


def _order(text: str, devices: int) -> np.ndarray:
    """Return positions of devices in the order of a text such as "[4,8]T(1,0)"; "" changes none."""
    numbers = np.arange(devices)
    if found := _ORDER.match(text):
        shape = [int(n) for n in found[1].split(",")]
        axes = [int(n) for n in found[2].split(",")] if found[2] else None
        numbers = numbers.reshape(shape)
        numbers = numbers.transpose(axes) if axes else numbers
    return numbers.ravel()


def _index(op: Operation) -> int:
    """Return the index of a get-tuple-element or of a parameter."""
    found = re.search(r"index=(\d+)", op.line) if op.opcode != "parameter" else None
    return int((found or _search(r"parameter\((\d+)\)", op.line))[1])


def _search(pattern: str | re.Pattern, text: str) -> re.Match:
    """Return the first match; raise UserError if there is none."""
    if found := re.search(pattern, text):
        return found
    raise UserError(f"the compiler's program is not understood: {text.strip()[:200]}")


def parse(text: str) -> Module:
    """Parse the text of a program; raises UserError if it is not HLO."""
    computations: dict[str, tuple[Operation, ...]] = {}
    operations: list[Operation] = []
    entry, name = "", ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name, operations = head[2], []
            entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = tuple(operations)
        elif name and (found := _OPERATION.match(line)):
            operations.append(_operation(found[2], line[found.end() :]))
    if not entry:
        raise UserError("the compiler's program has no ENTRY computation, so it is not HLO text.")
    return Module(computations, entry)


def _operation(name: str, line: str) -> Operation:
    """Parse one operation from the text after "%name = "."""
    opcode = _search(_OPCODE, f" {line}" if line.startswith("(") else line)
    # Layouts also have a word before a parenthesis, as in T(8,128), but it is in upper case.
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
    """Return the position of the parenthesis that closes the one open at `begin`."""
    depth = 1
    for place in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)
