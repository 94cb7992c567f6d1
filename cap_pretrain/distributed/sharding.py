"""One mesh of devices (data, fsdp, tensor) and what lies where on it.

Arrays are global: every computation is one `jax.jit` over the mesh and the compiler inserts the
communication (`pmap` is retired upstream, and `pjit` is `jit` now). Batches are split over data and
fsdp; parameters over fsdp and tensor by rules on their paths; optimizer state as its parameters.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from cap_pretrain import rules
from cap_pretrain.errors import UserError

BATCH_AXES = ("data", "fsdp")

# Over how many TPUs parameters and optimizer are split unless the config says. By the compiler's
# estimate (BENCHMARKS.md, "On a TPU pod") that is faster than not at all, as the update takes a
# part of the time and weights arrive while products are computed; but not over all there are: then
# the compiler takes the products apart, too.
FSDP_ON_TPUS = 16

# What splits one dimension: an axis of the mesh, several, or none.
Axes = str | Sequence[str] | None

# (path, axes of the trailing dimensions); leading dimensions, such as that of stacked layers, are
# whole. Tensor parallelism: heads and hidden units are split, and so is the vocabulary. Everything
# is split over fsdp, the vectors too: with their moments they are no small part of a small model.
RULES = (
    (r".*/(query|key|value|up|logits)/kernel", ("fsdp", "tensor")),
    (r".*/(query|key|value|up|logits)/bias", (("tensor", "fsdp"),)),
    (r".*/(out|down)/kernel", ("tensor", "fsdp")),
    (r".*/embedding", ("tensor", "fsdp")),
    (r".*/conv\d*/kernel", ("fsdp",)),  # channels out; there are as few as three in
    (r".*/kernel", ("fsdp", None)),
    (r".*", ("fsdp",)),
)


def mesh_shape(config: ConfigDict, devices: Sequence[jax.Device] | int) -> dict[str, int]:
    """Returns the size of each axis of a config's mesh.

    Args:
      config: see `config.mesh` in config.py.
      devices: what it is over; a number stands for devices that are no TPUs.

    Raises:
      UserError: the axes do not multiply to the number of devices, or do not divide the batch.
    """
    number = devices if isinstance(devices, int) else len(devices)
    shape = {axis: config.mesh[axis] for axis in ("data", "fsdp", "tensor")}
    free = [axis for axis, n in shape.items() if n == -1]
    possible = all(n > 0 or n == -1 or (n == 0 and axis == "fsdp") for axis, n in shape.items())
    if possible and not shape["fsdp"]:
        shape["fsdp"] = _usual_fsdp(shape, devices)
    said = ", ".join(f"mesh.{axis}={n}" for axis, n in shape.items())
    if len(free) > 1 or not possible:
        raise UserError(
            f"{said}: axes are positive, and at most one is -1 (what the others leave)."
        )
    fixed = math.prod(n for n in shape.values() if n != -1)
    if free:
        shape[free[0]] = max(1, number // fixed)
    if math.prod(shape.values()) != number:
        needs = f"a multiple of {fixed}" if free else f"{fixed}"
        raise UserError(f"{said}: this needs {needs} devices, there are {number}.")
    ways = shape["data"] * shape["fsdp"] * config.accumulate
    if config.batch_size % ways:
        raise UserError(
            f"batch_size: {config.batch_size} does not divide by data x fsdp x accumulate = {ways}."
        )
    return shape


def _usual_fsdp(shape: Mapping[str, int], devices: Sequence[jax.Device] | int) -> int:
    """What `mesh.fsdp=0` stands for."""
    if isinstance(devices, int) or devices[0].platform != "tpu" or shape["tensor"] == -1:
        return 1
    data = max(2, slices_of(devices)) if shape["data"] == -1 else shape["data"]
    return math.gcd(FSDP_ON_TPUS, max(1, len(devices) // (data * shape["tensor"])))


def slices_of(devices: Sequence[jax.Device]) -> int:
    """The number of TPU slices that devices belong to, which only share a data center's network."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of a config over `devices` (default: all); see `mesh_shape`.

    Of several TPU slices, which only the data center network joins, each holds a part of the data
    axis.

    Raises:
      UserError: as `mesh_shape`; or the data axis cannot be split over the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, devices)
    slices = slices_of(devices)
    split = {"allow_split_physical_axes": True}  # an axis of 8 in chips wired as 4 x 4 x 4
    if slices > 1:
        if shape["data"] % slices:
            raise UserError(
                f"mesh.data: {shape['data']} does not divide by the {slices} slices, which only "
                "share data; lower mesh.fsdp or mesh.tensor."
            )
        within = (shape["data"] // slices, shape["fsdp"], shape["tensor"])
        placed = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, **split)
    else:
        placed = mesh_utils.create_device_mesh(tuple(shape.values()), devices, **split)
    return Mesh(placed, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of scalars and keys: the whole on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis over data and fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def batch_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch lie on this host's devices, ascending: those it has to read.

    Hosts may hold the same rows, where the axis `tensor` crosses them, and rows here and there,
    where the mesh follows the wiring of a pod.

    Raises:
      UserError: the devices of the batch axes do not divide the batch.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size < 1 or batch_size % ways:
        raise UserError(
            f"batch_size: {batch_size} examples cannot be shared evenly by data x fsdp = {ways} "
            f"devices; choose a positive multiple of {ways}."
        )
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique([row for (s,) in held.values() for row in range(*s.indices(batch_size))])


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays of this host's `batch_rows`, sent to the devices explicitly."""
    sharding = batch_sharding(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # with several hosts JAX calls this implicit
        return {
            k: jax.make_array_from_process_local_data(sharding, np.asarray(v))
            for k, v in batch.items()
        }


def param_shardings(params: Any, mesh: Mesh, extra_rules: Sequence = ()) -> Any:
    """Returns the sharding of every parameter, by `config.mesh.rules` (extra), then `RULES`.

    Raises:
      UserError: one of the extra rules matches nothing, or has axes that cannot be.
    """
    rules.apply_rules(extra_rules, params, default=(), field="mesh.rules")  # strict
    for pattern, axes in extra_rules:
        _check_axes(pattern, axes, mesh)
    axes = rules.apply_rules(
        (*extra_rules, *RULES), params, default=(), field="mesh.rules", strict=False
    )
    return jax.tree.map(lambda p, a: NamedSharding(mesh, _fit(p.shape, a, mesh)), params, axes)


def gathered(module: nnx.Module) -> nnx.Module:
    """The module with what fsdp has split in whole, for a loop that would gather it at each turn.

    What `RULES` split over tensor stays so. To be called under `jax.jit`; without a mesh it does
    nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return module

    def constrain(param, sharding):
        kept = [tuple(a for a in _names(group) if a != "fsdp") for group in sharding.spec]
        return jax.lax.with_sharding_constraint(param, P(*(group or None for group in kept)))

    graphdef, params, others = nnx.split(module, nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    params = jax.tree.map(constrain, params, param_shardings(params, mesh))
    return nnx.merge(graphdef, params, others)


def state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each leaf of `state`, such as an optimizer's.

    A leaf whose path ends in a parameter's path lies as that parameter does; a factored moment,
    whose shape lacks a dimension of the parameter's, lies as the dimensions it has, which take over
    the axes of the one it lacks.
    """
    known = {
        path: (leaf.shape, rules.flatten(shardings)[path].spec)
        for path, leaf in rules.flatten(params).items()
    }

    def sharding_of(key_path, leaf):
        parts = rules.path_string(key_path).split("/")
        for start in range(len(parts)):
            path = "/".join(parts[start:])
            if path in known:
                return NamedSharding(mesh, _spec_like(leaf.shape, *known[path], mesh))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding_of, state)


def _spec_like(shape: tuple[int, ...], param_shape: tuple[int, ...], spec: P, mesh: Mesh) -> P:
    full = tuple(spec) + (None,) * (len(param_shape) - len(spec))
    if shape == param_shape:
        return P(*full)
    for missing in range(len(param_shape)):
        if shape == param_shape[:missing] + param_shape[missing + 1 :]:
            kept = full[:missing] + full[missing + 1 :]
            return _fit(shape, kept, mesh, spare=_names(full[missing]))
    return P()


def _fit(shape: tuple[int, ...], axes: Sequence[Axes], mesh: Mesh, spare: Sequence[str] = ()) -> P:
    """Places the `axes` of the trailing dimensions of a shape, each where it divides.

    An axis that does not divide its dimension, and each of `spare`, goes to the last of these
    dimensions that it does divide, or nowhere.
    """
    axes = axes[max(0, len(axes) - len(shape)) :]
    dims = range(len(shape) - len(axes), len(shape))
    placed: list[tuple[str, ...]] = [()] * len(shape)

    def put(axis: str, candidates: Iterable[int]) -> bool:
        for dim in candidates:
            together = (*placed[dim], axis)
            if shape[dim] % math.prod(mesh.shape[a] for a in together) == 0:
                placed[dim] = together
                return True
        return False

    own = ((axis, dim) for dim, group in zip(dims, axes, strict=True) for axis in _names(group))
    left = [axis for axis, dim in own if not put(axis, (dim,))]
    for axis in (*left, *spare):
        put(axis, reversed(dims))
    return P(*(group[0] if len(group) == 1 else group or None for group in placed))


def _check_axes(pattern: str, axes: Any, mesh: Mesh) -> None:
    try:
        names = [name for group in axes for name in _names(group)]
        fine = set(names) <= set(mesh.shape) and len(set(names)) == len(names)
    except TypeError:
        fine = False
    if not fine:
        raise UserError(
            f"mesh.rules: {pattern!r} has the axes {axes!r}. For each trailing dimension give one "
            f"of {', '.join(mesh.shape)}, or several, or None; none of them twice."
        )


def _names(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
