"""Minimal programs in the notation of the TPU compiler."""


def operation(name: str, cycles: int, operand: str = "p") -> str:
    """Return a fusion with an estimate of `cycles`."""
    return (
        f"  %{name} = f32[8,128]{{1,0:T(8,128)}} fusion(%{operand}), kind=kLoop, calls=%inside, "
        f'metadata={{op_name="jit(f)/jvp()/{name}"}}, backend_config={{"window_config":'
        f'{{"estimated_cycles":"{cycles}"}}}}\n'
    )


INSIDE = """\
%inside (q: f32[8,128]) -> f32[8,128] {
  %q = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %twice = f32[8,128]{1,0:T(8,128)} add(%q, %q)
}

"""

STATE = "(s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)})"


def loop(
    name: str,
    work: str,
    *,
    start: int = 0,
    step: int = 1,
    limit: int = 5,
    direction: str = "LT",
    fused: bool = False,
) -> str:
    """Return condition and body of a counting loop, `name`.condition and `name`.body."""
    condition = (
        f"  %limit = s32[]{{:T(128)}} constant({limit})\n"
        f"  %state = {STATE} parameter(0)\n"
        f"  %i = s32[]{{:T(128)}} get-tuple-element(%state), index=0\n"
    )
    compare = f"pred[]{{:T(512)}} compare(%a, %b), direction={direction}\n"
    before = ""
    if fused:
        before = (
            f"%{name}.compare (a: s32[], b: s32[]) -> pred[] {{\n"
            "  %a = s32[]{:T(128)} parameter(0)\n  %b = s32[]{:T(128)} parameter(1)\n"
            f"  ROOT %c = {compare}}}\n\n"
        )
        condition += (
            f"  ROOT %c = pred[]{{:T(512)}} fusion(%i, %limit), kind=kLoop, calls=%{name}.compare\n"
        )
    else:
        condition += f"  ROOT %c = {compare}".replace("%a", "%i").replace("%b", "%limit")
    return (
        f"{before}%{name}.condition (state: (s32[], f32[8,128])) -> pred[] {{\n{condition}}}\n\n"
        f"%{name}.body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {{\n"
        f"  %state = {STATE} parameter(0)\n"
        "  %i = s32[]{:T(128)} get-tuple-element(%state), index=0\n"
        "  %p = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1\n"
        f"  %one = s32[]{{:T(128)}} constant({step})\n"
        "  %next = s32[]{:T(128)} add(%i, %one)\n"
        f"{work}"
        f"  ROOT %out = {STATE} tuple(%next, %p)\n}}\n\n"
    )


def running(name: str, start: int = 0) -> str:
    """Return the operations that run a loop on %p."""
    return (
        f"  %{name}.start = s32[]{{:T(128)}} constant({start})\n"
        f"  %{name}.state = {STATE} tuple(%{name}.start, %p)\n"
        f"  %{name} = {STATE} while(%{name}.state), condition=%{name}.condition, "
        f'body=%{name}.body, metadata={{op_name="jit(f)/while"}}\n'
    )


def program(work: str, before: str = "") -> str:
    """Return a module whose entry does `work` on %p."""
    return (
        "HloModule jit_f, is_scheduled=true\n\n"
        f"{INSIDE}{before}ENTRY %main (p: f32[8,128]) -> f32[8,128] {{\n"
        "  %p = f32[8,128]{1,0:T(8,128)} parameter(0)\n"
        f"{work}  ROOT %end = f32[8,128]{{1,0:T(8,128)}} copy(%p)\n}}\n"
    )
