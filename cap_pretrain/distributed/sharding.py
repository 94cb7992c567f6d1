"""The device mesh (data, fsdp, tensor) and the shardings of batches, parameters and their state.

Arrays are global: every computation is one `jax.jit` over the mesh, and the compiler inserts the
communication. Batches are sharded over data and fsdp, parameters over fsdp and tensor by rules on
their paths, and optimizer state like the parameters it belongs to.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from cap_pretrain import rules
from cap_pretrain.distributed.platform import platform_of
from cap_pretrain.errors import UserError

BATCH_AXES = ("data", "fsdp")

# The default number of TPUs that share parameters and optimizer state, by the compiler's estimates
# (BENCHMARKS.md, "On a TPU pod"): the update gets shorter, and weights arrive during matrix
# products. Sharding over all TPUs is slower, because the compiler then splits the products, too.
FSDP_ON_TPUS = 16
FSDP_ON_GPUS = 8  # the GPUs of one host, which NVLink joins

Axes = str | Sequence[str] | None  # The mesh axes that shard one dimension: one, several, or none

# (path, axes of the trailing dimensions). Leading dimensions, such as that of stacked layers, are
# not sharded. Tensor parallelism shards heads, hidden units and the vocabulary. Everything is
# sharded over fsdp, vectors included: with their moments they are a large part of a small model.
RULES: tuple[tuple[str, tuple[Axes, ...]], ...] = (
    (r".*/(query|key|value|up|mlp/gate|logits)/kernel", ("fsdp", "tensor")),
    (r".*/(query|key|value|up|mlp/gate|logits)/bias", (("tensor", "fsdp"),)),
    (r".*/(out|down)/kernel", ("tensor", "fsdp")),
    (r".*/embedding", ("tensor", "fsdp")),
    (r".*/conv\d*/kernel", ("fsdp",)),  # output channels; there may be only three input channels
    (r".*/kernel", ("fsdp", None)),
    (r".*", ("fsdp",)),
)


def mesh_shape(config: ConfigDict, devices: Sequence[jax.Device] | int) -> dict[str, int]:
    """Return the size of each mesh axis by name ("data", "fsdp", "tensor") for `config.mesh`.

    `devices` may be a number of devices that are not TPUs. Raises UserError if the product of the
    axes is another one, or the batch size does not divide by data x fsdp x accumulate.
    """
    number = devices if isinstance(devices, int) else len(devices)
    shape = {axis: config.mesh[axis] for axis in ("data", "fsdp", "tensor")}
    free = [axis for axis, n in shape.items() if n == -1]
    possible = all(n > 0 or n == -1 or (n == 0 and axis == "fsdp") for axis, n in shape.items())
    if possible and not shape["fsdp"]:
        shape["fsdp"] = _default_fsdp(shape, devices)
    given = ", ".join(f"mesh.{axis}={n}" for axis, n in shape.items())
    if len(free) > 1 or not possible:
        raise UserError(
            f"{given}: axes must be positive; at most one may be -1 (all remaining devices)."
        )
    fixed = math.prod(n for n in shape.values() if n != -1)
    if free:
        shape[free[0]] = max(1, number // fixed)
    if math.prod(shape.values()) != number:
        needs = f"a multiple of {fixed}" if free else f"{fixed}"
        raise UserError(f"{given}: this needs {needs} devices, there are {number}.")
    ways = shape["data"] * shape["fsdp"] * config.accumulate
    if config.batch_size % ways:
        raise UserError(
            f"batch_size: {config.batch_size} does not divide by data x fsdp x accumulate = {ways}."
        )
    return shape


def _default_fsdp(shape: Mapping[str, int], devices: Sequence[jax.Device] | int) -> int:
    """Return the size of the fsdp axis for `mesh.fsdp=0`: 1 on CPUs."""
    if isinstance(devices, int) or shape["tensor"] == -1:
        return 1
    where = platform_of(devices[0])
    if where == "gpu":
        left = _gpus_of_a_host(devices)
        if shape["data"] != -1:
            left = min(left, len(devices) // shape["data"])
        return math.gcd(FSDP_ON_GPUS, max(1, left // shape["tensor"]))
    if where != "tpu":
        return 1
    data = max(2, slices_of(devices)) if shape["data"] == -1 else shape["data"]
    return math.gcd(FSDP_ON_TPUS, max(1, len(devices) // (data * shape["tensor"])))


def _gpus_of_a_host(devices: Sequence[jax.Device]) -> int:
    """Return how many GPUs share a host, by JAX's slices, and by processes of several GPUs."""
    each = len(devices) // slices_of(devices)
    own = len(devices) // len({device.process_index for device in devices})
    return min(each, own) if own > 1 else each


def slices_of(devices: Sequence[jax.Device]) -> int:
    """Return the number of TPU slices, or of hosts of GPUs, that JAX says `devices` belong to."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of a config over `devices`, by default all devices.

    Of several TPU slices, which only the data center network joins, each holds a part of the data
    axis. Raises UserError as `mesh_shape`, or if that axis does not divide by the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, devices)
    slices = slices_of(devices)
    split = {"allow_split_physical_axes": True}  # an axis of 8 in chips wired as 4 x 4 x 4
    if slices > 1:
        if shape["data"] % slices:
            raise UserError(
                f"mesh.data: {shape['data']} does not divide by the {slices} slices, across "
                "which only data is sharded; lower mesh.fsdp or mesh.tensor."
            )
        within = (shape["data"] // slices, shape["fsdp"], shape["tensor"])
        placed = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices, **split)
    else:
        placed = mesh_utils.create_device_mesh(tuple(shape.values()), devices, **split)
    return Mesh(placed, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of scalars and random keys: a full copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: the leading axis over data and fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def batch_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Return the rows of a global batch on this host's devices, which it must read: ascending, int.

    Hosts may hold the same rows, if the tensor axis crosses hosts, or rows that are not contiguous,
    if the mesh follows the wiring of a pod. Raises UserError unless data x fsdp divides
    `batch_size`.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size < 1 or batch_size % ways:
        raise UserError(
            f"batch_size: {batch_size} examples cannot be shared evenly by data x fsdp = {ways} "
            f"devices; choose a positive multiple of {ways}."
        )
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = [index[0].indices(batch_size) for index in held.values() if index]
    return np.unique([row for bounds in rows for row in range(*bounds)])


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Assemble global arrays on the mesh from each host's `batch_rows` of a batch."""
    sharding = batch_sharding(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # an explicit transfer, which JAX
        # regards as implicit with several hosts
        return {
            k: jax.make_array_from_process_local_data(sharding, np.asarray(v))
            for k, v in batch.items()
        }


def put_requests(requests: Sequence[bool], mesh: Mesh) -> jax.Array:
    """Put this host's requests on its devices: a global array, bool [devices, len(requests)]."""
    rows = NamedSharding(mesh, P(mesh.axis_names))
    with jax.transfer_guard_host_to_device("allow"):
        return jax.make_array_from_callback(
            (mesh.size, len(requests)), rows, lambda _: np.array([requests], bool)
        )


def param_shardings(params: Any, mesh: Mesh | AbstractMesh, extra_rules: Sequence = ()) -> Any:
    """Return the sharding of every parameter (or abstract shape), in a tree like `params`.

    The `extra_rules` of `config.mesh.rules` take precedence over `RULES`; UserError is raised if
    one matches no parameter or has invalid axes.
    """
    rules.apply_rules(extra_rules, params, default=(), field="mesh.rules")  # strict
    for pattern, axes in extra_rules:
        _check_axes(pattern, axes, mesh)
    axes = rules.apply_rules(
        (*extra_rules, *RULES), params, default=(), field="mesh.rules", strict=False
    )
    return jax.tree.map(lambda p, a: NamedSharding(mesh, _fit(p.shape, a, mesh)), params, axes)


def gathered(module: nnx.Module) -> nnx.Module:
    """Return `module` with its parameters gathered over fsdp but still sharded over tensor.

    Call it under `jax.jit`, before a loop that would gather them in each iteration. Without a mesh
    it returns `module`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return module

    def constrain(param, sharding):
        kept = [tuple(a for a in _names(group) if a != "fsdp") for group in sharding.spec]
        return jax.lax.with_sharding_constraint(param, P(*(group or None for group in kept)))

    graphdef, params, *others = nnx.split(module, nnx.Param, ...)
    arrays = nnx.to_pure_dict(params)
    whole = jax.tree.map(constrain, arrays, param_shardings(arrays, mesh))
    return nnx.merge(graphdef, whole, *others)


def state_shardings(state: Any, params: Any, shardings: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return the sharding of each leaf of a state, such as an optimizer's; leaves may be abstract.

    A leaf whose path ends in the path of one of `params` is sharded like it, as in `shardings`;
    "teacher" in a path does not count, so copies of parameters in `learners.teacher` are, too. A
    factored moment, whose shape lacks one dimension of the parameter, is sharded like the remaining
    dimensions, which also take over the axes of the missing one. Other leaves are replicated.
    """
    known = {
        path: (leaf.shape, rules.flatten(shardings)[path].spec)
        for path, leaf in rules.flatten(params).items()
    }

    def sharding_of(key_path, leaf):
        parts = [part for part in rules.path_string(key_path).split("/") if part != "teacher"]
        for start in range(len(parts)):
            path = "/".join(parts[start:])
            if path in known:
                param_shape, spec = known[path]
                return NamedSharding(mesh, _spec_like(leaf.shape, param_shape, spec, mesh))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding_of, state)


def _spec_like(
    shape: tuple[int, ...], param_shape: tuple[int, ...], spec: P, mesh: Mesh | AbstractMesh
) -> P:
    """Return the partition of a state leaf that belongs to a parameter; see `state_shardings`."""
    full = tuple(spec) + (None,) * (len(param_shape) - len(spec))
    if shape == param_shape:
        return P(*full)
    for missing in range(len(param_shape)):
        if shape == param_shape[:missing] + param_shape[missing + 1 :]:
            kept = full[:missing] + full[missing + 1 :]
            return _fit(shape, kept, mesh, spare=_names(full[missing]))
    return P()


def _fit(
    shape: tuple[int, ...],
    axes: Sequence[Axes],
    mesh: Mesh | AbstractMesh,
    spare: Sequence[str] = (),
) -> P:
    """Return the partition of a shape given mesh axes for its trailing dimensions.

    An axis that does not divide its dimension, and each axis of `spare`, moves to the last of these
    dimensions that it does divide, or is dropped.
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


def _check_axes(pattern: str, axes: Any, mesh: Mesh | AbstractMesh) -> None:
    """Raise UserError unless `axes` gives each dimension axes of the mesh, each at most once."""
    try:
        names = [name for group in axes for name in _names(group)]
        valid = set(names) <= set(mesh.shape) and len(set(names)) == len(names)
    except TypeError:
        valid = False
    if not valid:
        raise UserError(
            f"mesh.rules: {pattern!r} has the axes {axes!r}. For each trailing dimension give one "
            f"of {', '.join(mesh.shape)}, or several, or None; use none of them twice."
        )


def _names(axes: Axes) -> tuple[str, ...]:
    """Return the mesh axes of one dimension as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())
