"""Conversion between the tensors of torch models and our parameters, by tables of names.

A linear weight of torch is [out, in], a convolution's [out, in, height, width], and layers are
numbered in names. Ours are [in, out] and [height, width, in, out]; a patch embedding is a matrix
[height * width * in, out]; and a transformer's layers are stacked along a leading axis.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cap_pretrain.convert.weights import MissingTensorError, Weights
from cap_pretrain.errors import UserError

_LEAVES = {
    **{"kernel": "weight", "scale": "weight", "bias": "bias"},
    **{"mean": "running_mean", "var": "running_var"},
}
_PARTS = 3
_LISTED = 6  # names in a message


class Fused(NamedTuple):
    """A third of a fused projection: 0 for the query, 1 for the key, 2 for the value."""

    name: str  # its tensors are NAME_weight and NAME_bias
    third: int


Entry = str | Fused | Callable[[Callable[[str], np.ndarray]], np.ndarray] | None
"""What a table gives for a module of ours, or for a single parameter.

A torch name, with {} for the layer's number; a `Fused`; a function that computes the parameter,
given one that returns a tensor by name; or None for a parameter that is zero, as torch has none.
"""

Table = Mapping[str, Entry]
"""Path of a module or parameter of ours -> where it is in the torch model."""


def to_ours(
    weights: Weights, table: Table, shapes: Mapping[str, tuple[int, ...]], ignored: Iterable[str]
) -> dict[str, np.ndarray]:
    """Convert torch tensors to our parameters (and statistics), float32, for `shapes` by path.

    `ignored` are prefixes of torch names that belong to other parts of the model. Raises UserError
    if a tensor is missing, unknown, or has another shape.
    """
    params: dict[str, np.ndarray] = {}
    missing: dict[str, None] = {}  # an ordered set
    for path, shape in shapes.items():
        entry = _entry(table, path)
        stacked = path.startswith("blocks/")
        layers = range(shape[0]) if stacked else range(1)
        layer_shape = shape[1:] if stacked else shape
        arrays = []
        for layer in layers:
            try:
                arrays.append(_read(weights, entry, layer, path, layer_shape))
            except MissingTensorError as e:
                missing[e.args[0]] = None
        if len(arrays) == len(layers):
            params[path] = np.stack(arrays) if stacked else arrays[0]
    left = [name for name in weights.names if name not in weights.taken]
    unknown = [name for name in left if not name.startswith(tuple(ignored))]
    if missing or unknown:
        problems = [
            f"{what} {_few(names)}"
            for what, names in (("lacks", missing), ("has the unknown", unknown))
            if names
        ]
        raise UserError(
            f"{weights.where}: its weights do not fit the model: it {', and '.join(problems)}."
        )
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
        return Fused(f"{entry.name}_{_LEAVES[leaf]}", entry.third)
    return f"{entry}.{_LEAVES[leaf]}"


def _read(
    weights: Weights, entry: Entry, layer: int, path: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Return one parameter (of one layer, if they are stacked)."""
    if entry is None:
        return np.zeros(shape, np.float32)
    if not isinstance(entry, (str, Fused)):
        name, array = path, entry(weights.take)
    else:
        name = (entry.name if isinstance(entry, Fused) else entry).format(layer)
        array = weights.take(name)
    found = array.shape
    if isinstance(entry, Fused) and len(array) % _PARTS == 0:
        array = np.split(array, _PARTS)[entry.third]
    array = _from_theirs(path, array, shape)
    if array.shape != shape:
        raise UserError(
            f"{weights.where}: {name} has the shape {list(found)}, which does not fit the rest: as "
            f"{path} it would be {list(array.shape)} instead of {list(shape)}."
        )
    return array


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


def _few(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
