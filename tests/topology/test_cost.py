"""Cycles, collectives and waiting are added up through loops, branches and asynchronous pairs."""

import pytest

from cap_pretrain.telemetry.flops import Chip
from cap_pretrain.topology import cost, cycles, hlo
from tests.topology.programs import loop, operation, program, running

# One cycle or one byte takes a second.
CHIP = Chip(1.0, 1.0, 1.0, 1.0, links=4)
SIZE = 4 * 8 * 128


def measure(text: str, devices: int = 2) -> cost.Cost:
    return cycles.measure(hlo.parse(text), CHIP, devices)


def test_cycles_are_multiplied_by_the_iterations_of_nested_loops():
    inner = loop("inner", operation("deep", 3), limit=4)
    outer = loop("outer", operation("work", 10) + running("inner"), limit=5)
    found = measure(program(operation("once", 7) + running("outer"), inner + outer))
    assert found.work == found.seconds == 7 + 5 * (10 + 4 * 3)
    assert found.work_of["fusion", "jit(f)/jvp()/deep"] == 60
    assert not found.endless


def test_a_loop_of_unknown_length_counts_once_and_is_reported():
    text = program(running("l"), loop("l", operation("work", 10))).replace("direction=LT", "")
    text = text.replace("compare(%i, %limit), ", "custom-call(%i, %limit)")
    found = measure(text)
    assert found.work == 10 and found.endless == ["l"]


def test_the_more_expensive_branch_counts():
    branches = "".join(
        f"%branch_{n} (p: f32[8,128]) -> f32[8,128] {{\n"
        "  %p = f32[8,128]{1,0} parameter(0)\n"
        f"{operation('work', cycles)}}}\n\n"
        for n, cycles in enumerate((5, 11))
    )
    text = (
        "  %c = f32[8,128]{1,0} conditional(%p, %p, %p), "
        "branch_computations={%branch_0, %branch_1}\n"
    )
    assert measure(program(text, branches)).work == 11


def collective(kind: str, opcode: str, operand: str = "p", more: str = "") -> str:
    return (
        f"  %{opcode} = f32[8,128]{{1,0}} {opcode}(%{operand}), channel_id=1, "
        f"replica_groups=[1,2]<=[2], to_apply=%inside{more}\n"
    )


def test_a_collective_is_waited_for():
    found = measure(program(operation("work", 10) + collective("all-reduce", "all-reduce")))
    # In a ring of two, each chip sends half of the array twice.
    assert found.seconds == 10 + SIZE and found.waited["ici"] == SIZE
    (kind,) = found.collectives
    assert kind == "all-reduce"
    assert found.collectives[kind] == cost.Collective(1, SIZE, SIZE, SIZE)


@pytest.mark.parametrize(("work", "waited"), [(100, SIZE - 100), (SIZE + 100, 0)])
def test_work_between_start_and_done_hides_the_collective(work: int, waited: int):
    pair = (
        collective("all-reduce", "all-reduce-start")
        + operation("meanwhile", work)
        + "  %done = f32[8,128]{1,0} all-reduce-done(%all-reduce-start)\n"
    )
    found = measure(program(pair))
    assert found.seconds == max(work, SIZE) and found.waited["ici"] == waited
    assert found.collectives["all-reduce"].count == 1


def spread(layer: int, work: int) -> tuple[str, str]:
    """Return four operations with pieces of a gather, one before the last unrelated, and bodies."""
    names = [f"{name}_{layer}" for name in ("begins", "goes_on", "goes_on_more", "ends")]
    chain = f', frontend_attributes={{chain_id="{layer}"}}'
    within = "".join(
        f"%{name}.body (q: f32[8,128]) -> f32[8,128] {{\n  %q = f32[8,128]{{1,0}} parameter(0)\n"
        f"{collective('all-gather', 'all-gather', 'q', chain)}}}\n\n"
        for name in names
    )
    pieces = [
        operation(name, work * (0 < n < 3)).replace("%inside", f"%{name}.body")
        for n, name in enumerate(names)
    ]
    return "".join([*pieces[:3], operation(f"beside_{layer}", work), pieces[3]]), within


@pytest.mark.parametrize(("work", "waited"), [(100, SIZE - 300), (SIZE, 0)])
def test_pieces_in_several_operations_are_one_collective(work: int, waited: int):
    """Each layer has a separate collective, although both layers share one channel."""
    text, within = zip(*(spread(layer, work) for layer in (25, 26)), strict=True)
    found = measure(program("".join(text), "".join(within)))
    assert found.collectives["all-gather"] == cost.Collective(2, 2 * SIZE, 2 * SIZE, 2 * SIZE)
    assert found.seconds == 2 * max(3 * work, SIZE) and found.waited["ici"] == 2 * waited


def test_an_all_reduce_and_a_slice_are_a_reduce_scatter():
    within = (
        "%all-reduce-scatter (q: f32[8,128]) -> f32[8,128] {\n"
        "  %q = f32[8,128]{1,0} parameter(0)\n"
        f"{collective('all-reduce', 'all-reduce', 'q')}}}\n\n"
    )
    holder = operation("r", 0).replace("%inside", "%all-reduce-scatter")
    holder = holder.replace(
        "backend_config={", 'backend_config={"emitter":"AllReduceScatterFusion",'
    )
    found = measure(program(holder, within))
    assert found.collectives == {"reduce-scatter": cost.Collective(1, SIZE, SIZE / 2, SIZE / 2)}


@pytest.mark.parametrize(
    ("devices", "rings", "fraction"),
    [(2, "", 1), (16, "", 0.5), (2, "1", 0.5), (16, "2", 1), (16, "3", 1)],
)
def test_a_ring_uses_two_of_a_chips_four_links(devices: int, rings: str, fraction: float):
    more = f", strategy=StrategyND{{colors:{rings} phases:1}}" if rings else ""
    found = measure(program(collective("all-reduce", "all-reduce", more=more)), devices)
    assert found.seconds == SIZE / fraction


def test_an_early_copy_moves_its_result():
    pair = (
        "  %s = (f32[2,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%p)\n"
        "  %done = f32[2,128]{1,0:S(1)} copy-done(%s)\n"
    )
    found = measure(program(pair))
    assert found.seconds == found.waited["hbm"] == 4 * 2 * 128


@pytest.mark.parametrize(
    ("kind", "fraction"),
    [("all-reduce", 1.5), ("all-gather", 3), ("reduce-scatter", 0.75), ("all-to-all", 0.75)],
)
def test_bytes_sent_in_a_ring_of_four(kind: str, fraction: float):
    assert cost.sent_fraction(kind, 4) == fraction
    assert cost.sent_fraction(kind, 1) == 0


def test_traffic_counts_slices_but_not_the_cores_own_memory():
    slicing = """\
%slicing (a: f32[6,8,128], i: s32[]) -> f32[1,8,128] {
  %a = f32[6,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %cut = f32[1,8,128]{2,1,0} dynamic-slice(%a, %i, %i, %i)
}

"""
    work = (
        "  %all = f32[6,8,128]{2,1,0} custom-call(%p)\n"
        "  %i = s32[] constant(0)\n"
        "  %near = f32[8,128]{1,0:S(1)} copy(%p)\n"
        "  %cut = f32[1,8,128]{2,1,0} fusion(%all, %i), kind=kLoop, calls=%slicing\n"
    )
    module = hlo.parse(program(work, slicing))
    traffic = {op.name: cost.traffic(module, "main", op) for op in module.computations["main"]}
    assert traffic["cut"] == 2 * SIZE + 4 and traffic["near"] == SIZE
    assert traffic["all"] == 7 * SIZE
