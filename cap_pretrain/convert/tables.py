"""Conversion between the tensors of torch models and our parameters, by tables of names.

A linear weight of torch is [out, in], a convolution's [out, in, height, width], and layers are
numbered in names. Ours are [in, out] and [height, width, in, out]; a patch embedding is a matrix
[height * width * in, out]; and a transformer's layers are stacked along a leading axis.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from cap_pretrain.convert.weights import MissingTensorError, Weights, few
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import parsing

_LEAVES = {
    **{"kernel": "weight", "scale": "weight", "bias": "bias"},
    **{"mean": "running_mean", "var": "running_var"},
}
_PARTS = 3


class Fused(NamedTuple):
    """A third of a fused projection: 0 for the query, 1 for the key, 2 for the value."""

    name: str  # its tensors are NAME_weight and NAME_bias
    third: int
    separator: str = "_"  # after the name


class Computed(NamedTuple):
    """A function of the tensors with these names; it has to work with arrays of NumPy and JAX."""

    names: tuple[str, ...]
    function: Callable[..., Any]


Entry = str | Fused | Computed | None
"""What a table gives for a module of ours, or for a single parameter.

A torch name, with {} for the layer's number; a `Fused`; a `Computed`; or None for a parameter that
is zero, as torch has none.
"""

Table = Mapping[str, Entry]
"""Path of a module or parameter of ours -> where it is in the torch model."""


def to_ours(
    weights: Weights, table: Table, shapes: Mapping[str, tuple[int, ...]], ignored: Iterable[str]
) -> dict[str, np.ndarray]:
    """Convert torch tensors to our parameters (and statistics), float32, for `shapes` by path.

    `ignored` are prefixes of torch names that belong to other parts of the model. Raises UserError
    if a tensor is missing, unknown, or has another shape, before any is read.
    """
    missing: dict[str, None] = {}  # an ordered set
    for path, whole in shapes.items():
        for entry, shape in _layers(table, path, whole):
            try:
                _check(weights, entry, path, shape)
            except MissingTensorError as e:
                missing[e.name] = None
    others = tuple(ignored)
    left = [name for name in weights.names if name not in weights.used]
    unknown = [name for name in left if not name.startswith(others)]
    if missing or unknown:
        problems = [
            f"{what} {few(names)}"
            for what, names in (("lacks", missing), ("has the unknown", unknown))
            if names
        ]
        raise UserError(
            f"{weights.where}: its weights do not fit the model: it {', and '.join(problems)}."
        )
    params = {}
    for path, whole in shapes.items():
        arrays = [
            np.zeros(shape, np.float32)
            if entry is None
            else _convert(entry, [weights.take(name) for name in _names(entry)], path, shape)
            for entry, shape in _layers(table, path, whole)
        ]
        params[path] = np.stack(arrays) if _stacked(path) else arrays[0]
    return params


def to_torch(params: Mapping[str, np.ndarray], table: Table) -> dict[str, np.ndarray]:
    """Convert parameters to contiguous tensors by torch name, for names and `Fused` in `table`."""
    tensors: dict[str, np.ndarray] = {}
    thirds: dict[str, list[Any]] = {}
    for path, array in params.items():
        entry = _entry(table, path)
        stacked = path.startswith("blocks/")
        for layer, one in enumerate(array if stacked else array[None]):
            one = _to_theirs(path, np.asarray(one))
            if isinstance(entry, Fused):
                parts = thirds.setdefault(entry.name.format(layer), [None] * _PARTS)
                parts[entry.third] = one
            elif isinstance(entry, str):
                tensors[entry.format(layer)] = one
            else:
                raise TypeError(f"{path}: its table entry has no inverse: {entry}")
    tensors |= {name: np.concatenate(parts) for name, parts in thirds.items()}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _entry(table: Table, path: str) -> Entry:
    """Return the entry of a parameter, with torch names completed by `weight` or `bias`."""
    if path in table:
        return table[path]
    module, _, leaf = path.rpartition("/")
    entry = table[module]
    if isinstance(entry, Fused):
        return entry._replace(name=f"{entry.name}{entry.separator}{_LEAVES[leaf]}")
    return f"{entry}.{_LEAVES[leaf]}"


def _stacked(path: str) -> bool:
    return path.startswith("blocks/")


def _layers(
    table: Table, path: str, shape: tuple[int, ...]
) -> Iterator[tuple[Entry, tuple[int, ...]]]:
    """Yield the entry and the shape of a parameter, or those of its layers if it is stacked."""
    entry = _entry(table, path)
    if not _stacked(path):
        yield entry, shape
        return
    for layer in range(shape[0]):
        if isinstance(entry, str):
            yield entry.format(layer), shape[1:]
        elif isinstance(entry, Fused):
            yield entry._replace(name=entry.name.format(layer)), shape[1:]
        elif isinstance(entry, Computed):
            names = tuple(name.format(layer) for name in entry.names)
            yield entry._replace(names=names), shape[1:]
        else:
            yield entry, shape[1:]


def _names(entry: Entry) -> tuple[str, ...]:
    """Return the names of the tensors that an entry is made of."""
    if isinstance(entry, Computed):
        return entry.names
    return () if entry is None else (entry.name if isinstance(entry, Fused) else entry,)


def _check(weights: Weights, entry: Entry, path: str, shape: tuple[int, ...]) -> None:
    """Raise UserError if a parameter's tensors have other shapes than it needs."""
    if entry is None:
        return
    name, shapes = path, [weights.shape(name) for name in _names(entry)]
    with parsing(f"{weights.where}: {few(_names(entry))}"):
        if isinstance(entry, Computed):
            structs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
            shapes, entry = [jax.eval_shape(entry.function, *structs).shape], path
        else:
            (name,) = _names(entry)
        stand_ins = [np.broadcast_to(np.float32(0), shape) for shape in shapes]  # take no memory
        found = _convert(entry, stand_ins, path, shape).shape
    if found != shape:
        raise UserError(
            f"{weights.where}: {name} has the shape {list(shapes[0])}, which does not fit the "
            f"rest: as {path} it would be {list(found)} instead of {list(shape)}."
        )


def _convert(
    entry: Entry, arrays: list[np.ndarray], path: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Return a parameter, given its tensors; it has another shape if they do not fit."""
    if isinstance(entry, Computed):
        array = entry.function(*arrays)
    elif isinstance(entry, Fused) and len(arrays[0]) % _PARTS == 0:
        array = np.split(arrays[0], _PARTS)[entry.third]
    else:
        array = arrays[0]
    return _from_theirs(path, array, shape)


def _from_theirs(path: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Transpose a torch tensor to our layout."""
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
        return array if len(shape) == 4 else array.reshape(-1, array.shape[-1])
    if path.endswith("/kernel"):
        return array.T
    # Single vectors come as [D], [1, D] or [1, 1, D].
    return array.reshape(shape) if array.shape[-1:] == shape[-1:] == (array.size,) else array


def _to_theirs(path: str, array: np.ndarray) -> np.ndarray:
    """Transpose a parameter of ours to the layout of torch."""
    if path == "patch_embedding/kernel":
        side = round((len(array) / 3) ** 0.5)
        return array.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
    if path == "head/probe":
        return array[None]
    return array.T if path.endswith("/kernel") else array
