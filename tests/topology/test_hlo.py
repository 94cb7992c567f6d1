"""Parsing the programs of the compiler: operations, loops and groups of devices."""

import re

import jax
import jax.numpy as jnp
import pytest

from cap_pretrain.errors import UserError
from cap_pretrain.topology import hlo
from tests.topology.programs import loop, operation, program, running


def trip_counts(text: str) -> dict[str, int | None]:
    module = hlo.parse(text)
    return {
        op.name: module.trips(op, name)
        for name, ops in module.computations.items()
        for op in ops
        if op.opcode == "while"
    }


def test_operation():
    line = (
        "  ROOT %fusion.7 = (f32[12,196]{1,0:T(8,128)S(1)}, /*index=1*/bf16[3]{0:T(1024)}) "
        "fusion(%a.1, %b), kind=kOutput, calls=%inside, "
        'metadata={op_name="jit(f)/dot(general)"}, backend_config={"estimated_cycles":"41"}\n'
    )
    op = hlo.parse(program(line)).computations["main"][1]
    assert (op.name, op.opcode, op.operands) == ("fusion.7", "fusion", ("a.1", "b"))
    assert [array.shape for array in op.results] == [(12, 196), (3,)]
    assert op.results[0].layout.endswith("S(1)") and op.size == 4 * 12 * 196 + 2 * 3
    assert op.runs("calls") == ("inside",) and op.cycles == 41
    assert op.op_name == "jit(f)/dot(general)"


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, 5),
        ({"limit": 7, "start": 3}, 4),
        ({"limit": 7, "step": 2}, 4),
        ({"limit": 7, "direction": "LE"}, 8),
        ({"limit": 0, "start": 6, "step": -2, "direction": "GT"}, 3),
        ({"fused": True}, 5),
        ({"limit": 2, "start": 3}, 0),
    ],
)
def test_trip_count_of_a_counting_loop(how: dict, expected: int):
    text = program(running("l", how.get("start", 0)), loop("l", "", **how))
    assert trip_counts(text) == {"l": expected}


def test_trip_count_noted_by_the_compiler():
    text = program(running("l"), loop("l", "")).replace(
        "body=%l.body", 'body=%l.body, backend_config={"known_trip_count":{"n":"9"}}'
    )
    assert trip_counts(text) == {"l": 9}


def test_trip_count_that_depends_on_data_is_unknown():
    text = program(running("l"), loop("l", "")).replace(
        "%l.start = s32[]{:T(128)} constant(0)", "%l.start = s32[]{:T(128)} convert(%p)"
    )
    assert trip_counts(text) == {"l": None}


def test_a_scan_compiled_here():
    def f(x):
        def inner(y, _):
            return jax.lax.scan(lambda y, _: (jnp.sin(y @ x), None), y, length=3)[0], None

        return jax.lax.scan(inner, x, length=7)[0]

    text = jax.jit(f).lower(jnp.ones((16, 16))).compile().as_text()
    assert sorted(trip_counts(text).values()) == [3, 7]
    # The CPU compiler notes the count; without the note it is derived from the condition.
    bare = re.sub(r"known_trip_count", "forgotten", text)
    assert sorted(trip_counts(bare).values()) == [3, 7]


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("replica_groups=[4,8]<=[32]", 8),
        ("replica_groups={{0,1,2},{3,4,5}}", 3),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=1] {'a','b'}", 8),
        ("replica_groups=mesh['a'=4,'b'=2,'c'=1] {'b'}", 2),
        ("replica_groups=mesh['a'=8,'b'=1,'c'=4], device_ids=([4,8]T(1,0)) {'a'}", 8),
        ("replica_groups=mesh['a'=8,'b'=4], device_ids=([32]) {'a':(2)4,'b'}", 16),
        ("replica_groups={}", 32),
        ("source_target_pairs={{0,1},{1,0}}", 32),
    ],
)
def test_groups(written: str, size: int):
    work = f"  %r = f32[8,128]{{1,0}} all-reduce(%p), channel_id=1, {written}, to_apply=%inside\n"
    module = hlo.parse(program(work))
    assert module.groups(module.operation("main", "r"), 32) == size


def test_groups_in_unknown_notation_are_refused():
    work = "  %r = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups=spiral[4], to_apply=%i\n"
    module = hlo.parse(program(work))
    with pytest.raises(UserError, match=r"not understood: spiral\[4\]"):
        module.groups(module.operation("main", "r"), 32)


def test_text_that_is_not_hlo_is_refused():
    with pytest.raises(UserError, match="not HLO"):
        hlo.parse("nothing")


def test_operations_of_an_unknown_kind_are_kept():
    module = hlo.parse(program(operation("work", 3) + "  %t = token[] after-all()\n"))
    assert [op.opcode for op in module.computations["main"]] == [
        *("parameter", "fusion", "after-all", "copy")
    ]
