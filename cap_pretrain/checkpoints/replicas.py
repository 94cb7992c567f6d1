"""Reading each byte of a checkpoint once, although several hosts need it.

Data replicas hold equal arrays, and by default Orbax has each host read what its devices need. Here
one replica reads an array, or a part of it, and sends it to the others over the network that joins
the devices. Different arrays are read by different replicas, so that all hosts read equally much.

Parts are read in whole stored chunks: a chunk that several devices need, because the mesh of the
restart differs from that of the save, is read by one.

Orbax has a handler for this, `SingleReplicaArrayHandler`. It adds what was read to zeros in the
type of the array, which turns -0.0 into 0.0, so that fingerprints differ; needs hosts that belong
to one replica each; has the first replica read everything; and reads a chunk that several devices
need several times. Here bits are added, as integers. Orbax still does the reading.
"""

import asyncio
import dataclasses
import itertools
import math
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cap_pretrain.checkpoints.reading import agree

GROUP_BYTES = 2**28
"""Bytes on a device that are sent at once, which bounds the memory that sending needs."""

PART_BYTES = 2**30
"""A part that would be larger is read as the devices need it, which reads some chunks repeatedly.

A replica of it in each device's memory would take too much.
"""

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by bytes of an element


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a checkpoint says of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunk: tuple[int, ...]  # the shape of what is read at once


@dataclasses.dataclass(frozen=True)
class Part:
    """An array that one replica reads and sends to the others.

    The array has the sharding `target` in the end. It is read with the partition `spec`, the same
    or a coarser one, by the devices of `readers`; the devices along `axes` of the mesh hold equal
    parts then.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    target: NamedSharding
    spec: P
    axes: tuple[str, ...]
    readers: Mesh

    @property
    def summed(self) -> jax.ShapeDtypeStruct:
        """The array in which the devices along `axes` have an entry each along dimension 0."""
        mesh = self.target.mesh
        copies = math.prod(mesh.shape[axis] for axis in self.axes)
        first, *rest = self.shape or (1,)
        split, *others = tuple(self.spec) or (None,)
        spec = P((*self.axes, *_names(split)), *others)
        return jax.ShapeDtypeStruct(
            (copies * first, *rest), self.dtype, sharding=NamedSharding(mesh, spec)
        )

    @property
    def bytes(self) -> int:
        """The bytes that a device holds while the array is sent."""
        shard = self.summed.sharding.shard_shape(self.summed.shape)
        return math.prod(shard) * self.dtype.itemsize

    def is_read_here(self) -> bool:
        """Return whether a device of this host reads the array."""
        here = jax.process_index()
        return any(device.process_index == here for device in self.readers.devices.flat)


class ArrayHandler(ocp.type_handlers.ArrayHandler):
    """Orbax's handler of arrays on devices; of several hosts, one reads each byte."""

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Any:
        """Read the arrays of `infos` with the shardings in `args`."""
        if jax.process_count() == 1 or not infos or args is None:
            return await super().deserialize(infos, args)
        stored = await _stored_on_host_0(self, infos)
        parts = plan([arg.sharding for arg in args], stored)

        async def read() -> dict[int, jax.Array]:
            chosen = _read_here(parts, len(infos))
            own = [_read_by(args[n], parts[n]) if n in parts else args[n] for n in chosen]
            found = await super(ArrayHandler, self).deserialize([infos[n] for n in chosen], own)
            return dict(zip(chosen, found, strict=True))

        arrays = await _read_and_send(read, parts)
        return [arrays[n] for n in range(len(infos))]


class HostArrayHandler(ocp.type_handlers.NumpyHandler):
    """Orbax's handler of arrays in the hosts' memory; of several hosts, one reads each array."""

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Any:
        """Read the arrays of `infos`."""
        if jax.process_count() == 1 or not infos:
            return await super().deserialize(infos, args)
        args = args or [ocp.RestoreArgs()] * len(infos)
        stored = await _stored_on_host_0(self, infos)
        whole = NamedSharding(_mesh_of_hosts(), P())
        parts = plan([whole] * len(infos), stored)

        async def read() -> dict[int, Any]:
            chosen = _read_here(parts, len(infos))
            found = await super(HostArrayHandler, self).deserialize(
                [infos[n] for n in chosen], [args[n] for n in chosen]
            )
            return dict(zip(chosen, found, strict=True))

        arrays = await _read_and_send(read, parts, on_host=True)
        return [arrays[n] for n in range(len(infos))]


def plan(targets: Sequence[Any], stored: Sequence[Stored]) -> dict[int, Part]:
    """Choose the arrays, by number, that one replica reads and sends; all hosts choose the same.

    Of the others, every host reads what its devices need.

    Args:
        targets: the sharding that each array has in the end.
        stored: the arrays as they are stored.
    """
    sizes = [math.prod(each.shape) * each.dtype.itemsize for each in stored]
    chosen: dict[int, Part] = {}
    of_hosts, of_devices = np.zeros(jax.process_count()), dict.fromkeys(jax.devices(), 0.0)
    for n in sorted(range(len(stored)), key=lambda n: (-sizes[n], n)):
        target, array = targets[n], stored[n]
        if not isinstance(target, NamedSharding) or array.dtype.itemsize not in _BITS:
            continue
        spec = _aligned(target, array)
        mesh, used = target.mesh, {axis for group in spec for axis in _names(group)}
        axes = tuple(axis for axis, n in mesh.shape.items() if axis not in used and n > 1)
        if not axes:
            continue
        grid = np.moveaxis(mesh.devices, [mesh.axis_names.index(a) for a in axes], range(len(axes)))
        grid = grid.reshape(math.prod(mesh.shape[axis] for axis in axes), -1)
        hosts = np.vectorize(lambda device: device.process_index)(grid)
        if spec == target.spec and (hosts == hosts[0]).all():  # nothing crosses hosts
            continue
        load = np.vectorize(of_devices.__getitem__)(grid)
        best = int((of_hosts[hosts] + load).max(axis=1).argmin())
        each = sizes[n] / grid.shape[1]
        np.add.at(of_hosts, hosts[best], each)
        for device in grid[best]:
            of_devices[device] += each
        where = np.unravel_index(best, [mesh.shape[axis] for axis in axes])
        index = [
            slice(where[axes.index(a)], where[axes.index(a)] + 1) if a in axes else slice(None)
            for a in mesh.axis_names
        ]
        readers = Mesh(mesh.devices[tuple(index)], mesh.axis_names, axis_types=mesh.axis_types)
        chosen[n] = Part(array.shape, array.dtype, target, spec, axes, readers)
    return dict(sorted(chosen.items()))


def _aligned(target: NamedSharding, array: Stored) -> P:
    """Return the finest partition, at most that of `target`, that cuts no stored chunk.

    If a device would hold more than PART_BYTES of it, return that of `target`.
    """
    kept = []
    for size, chunk, group in itertools.zip_longest(array.shape, array.chunk, target.spec):
        names: tuple[str, ...] = ()
        for axis in _names(group):
            ways = math.prod(target.mesh.shape[name] for name in (*names, axis))
            if size % ways or (size // ways) % max(chunk, 1):
                break
            names = (*names, axis)
        kept.append(names[0] if len(names) == 1 else names or None)
    spec = P(*kept[: len(target.spec)])
    shard = NamedSharding(target.mesh, spec).shard_shape(array.shape)
    return spec if math.prod(shard) * array.dtype.itemsize <= PART_BYTES else target.spec


async def _stored_on_host_0(handler: Any, infos: Sequence[Any]) -> list[Stored]:
    """Return what the checkpoint says of arrays, which host 0 reads for all hosts."""
    found, error = [], None
    if jax.process_index() == 0:
        try:
            for each in await handler.metadata(infos):
                chunk = each.storage and each.storage.chunk_shape
                found.append([each.shape, str(np.dtype(each.dtype)), chunk or each.shape])
        except Exception as e:
            error = e
    return [
        Stored(tuple(shape), jnp.dtype(dtype), tuple(chunk))
        for shape, dtype, chunk in agree(error, found)
    ]


def _mesh_of_hosts() -> Mesh:
    """Return a mesh of one device of each host."""
    first = {device.process_index: device for device in reversed(jax.devices())}
    return Mesh(np.array([first[n] for n in sorted(first)]), ("host",))


def _read_by(args: Any, part: Part) -> Any:
    """Return Orbax's arguments for reading a part on the devices that read it."""
    sharding = NamedSharding(part.readers, part.spec)
    return dataclasses.replace(args, sharding=sharding, mesh=None, mesh_axes=None)


def _read_here(parts: Mapping[int, Part], count: int) -> list[int]:
    """Return which of `count` arrays this host reads."""
    return [n for n in range(count) if n not in parts or parts[n].is_read_here()]


async def _read_and_send(
    read: Callable[[], Coroutine[Any, Any, dict[int, Any]]],
    parts: Mapping[int, Part],
    *,
    on_host: bool = False,
) -> dict[int, Any]:
    """Return all arrays by number: as `read` returns them, or sent by other hosts.

    Raises ReadingFailedError on all hosts if one could not read.

    Args:
        read: reads what this host reads.
        parts: what is sent.
        on_host: return arrays in the host's memory.
    """
    groups = list(_groups(parts))
    arrays: dict[int, Any] = {}
    programs: list[Any] = []
    error = None
    try:
        compiling = (asyncio.to_thread(_compiled, list(group.values())) for group in groups)
        arrays, *programs = await asyncio.gather(read(), *compiling)
    except Exception as e:
        error = e
    agree(error)
    for group, program in zip(groups, programs, strict=True):
        held = [_with_zeros(part, arrays.pop(n, None)) for n, part in group.items()]
        sent = jax.block_until_ready(program(*held))
        if on_host:
            sent = [np.array(each.addressable_data(0)) for each in sent]
        arrays.update(zip(group, sent, strict=True))
        del held, sent
    return arrays


def _groups(parts: Mapping[int, Part]) -> Iterator[dict[int, Part]]:
    """Yield the parts, all on one mesh, that are sent together."""
    group: dict[int, Part] = {}
    for n, part in parts.items():
        if group and sum(each.bytes for each in (*group.values(), part)) > GROUP_BYTES:
            yield group
            group = {}
        group[n] = part
    if group:
        yield group


def _with_zeros(part: Part, array: jax.Array | np.ndarray | None) -> jax.Array:
    """Return what the devices of this host contribute: what they have read, or else zeros."""
    summed = part.summed
    shape = summed.sharding.shard_shape(summed.shape)
    zeros = np.zeros(shape, part.dtype)
    held: dict[jax.Device, Any] = {}
    if isinstance(array, jax.Array):
        held = {each.device: each.data for each in array.addressable_shards}
    elif array is not None:
        held = dict.fromkeys(part.readers.devices.flat, array)
    buffers = []
    for device in summed.sharding.addressable_devices:
        own = held.get(device, zeros)
        if own.shape != shape:  # a scalar
            own = np.asarray(own).reshape(shape)
        buffers.append(jax.device_put(own, device))
    return jax.make_array_from_single_device_arrays(
        summed.shape, summed.sharding, buffers, dtype=part.dtype
    )


def _compiled(parts: Sequence[Part]) -> Any:
    """Compile the program that sends these parts, given what `_with_zeros` returns."""
    mesh = parts[0].target.mesh
    assert isinstance(mesh, Mesh)
    summed = [part.summed for part in parts]

    def add(*blocks: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(
            _sum_of_bits(block, part.axes).reshape(
                NamedSharding(mesh, part.spec).shard_shape(part.shape)
            )
            for part, block in zip(parts, blocks, strict=True)
        )

    added = jax.shard_map(
        add,
        mesh=mesh,
        in_specs=tuple(each.sharding.spec for each in summed),
        out_specs=tuple(part.spec for part in parts),
        check_vma=False,
    )

    def send(*blocks: jax.Array) -> tuple[jax.Array, ...]:
        # Integers until the end: XLA may cut bfloat16 as float32, which changes NaNs.
        return tuple(
            _of_bits(jax.lax.with_sharding_constraint(bits, part.target), part.dtype)
            for part, bits in zip(parts, added(*blocks), strict=True)
        )

    with jax.set_mesh(mesh):
        program = jax.jit(send, out_shardings=tuple(part.target for part in parts))
        return program.lower(*summed).compile()


def _sum_of_bits(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Add the bits of `x`, as integers, over mesh axes along which only one `x` is not zero."""
    kind = _BITS[x.dtype.itemsize]
    is_bool = x.dtype == jnp.bool_
    bits = x.astype(kind) if is_bool else jax.lax.bitcast_convert_type(x, kind)
    # Not every backend adds 16-bit integers over devices.
    return jax.lax.psum(bits.astype(jnp.uint32), axes).astype(kind)


def _of_bits(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Return the array of a dtype that has these bits."""
    is_bool = dtype == jnp.bool_
    return bits.astype(dtype) if is_bool else jax.lax.bitcast_convert_type(bits, dtype)


def _names(group: Any) -> tuple[str, ...]:
    """Return the mesh axes of one dimension as a tuple."""
    return (group,) if isinstance(group, str) else tuple(group or ())
