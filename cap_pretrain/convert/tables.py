"""Tables of names, and how a tensor of torch's becomes a parameter of ours and back.

torch has a linear layer's weight as [out, in] and a convolution's as [out, in, height, width], and
names every layer by its number; ours are [in, out] and [height, width, in, out], a patch embedding
is a product with [height * width * in, out], and layers of transformers are stacked along a leading
axis.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cap_pretrain.convert.weights import Missing, Weights
from cap_pretrain.errors import UserError

_LEAVES = {
    **{"kernel": "weight", "scale": "weight", "bias": "bias"},
    **{"mean": "running_mean", "var": "running_var"},
}
_PARTS = 3
_TOLD = 6  # names in a message


class Fused(NamedTuple):
    """A third, 0, 1 or 2, of a projection to query, key and value: `NAME_weight`, `NAME_bias`."""

    name: str
    third: int


# What stands in a table for a module of ours, or for a single parameter: the name of theirs, with
# {} for the layer's number; how to make it of others, given a function that takes a tensor by its
# name; or None where they have none and it is zero.
Entry = str | Fused | Callable[[Callable[[str], np.ndarray]], np.ndarray] | None
Table = Mapping[str, Entry]


def to_ours(
    weights: Weights, table: Table, shapes: Mapping[str, tuple[int, ...]], ignored: Iterable[str]
) -> dict[str, np.ndarray]:
    """Returns our parameters, and statistics if they are asked for, by path, float32.

    Args:
      weights: theirs.
      table: for each module of ours, what is theirs.
      shapes: the shape of each of ours by path.
      ignored: what names of theirs begin with that belong to other parts of their model.

    Raises:
      UserError: weights are missing, left over, or of another shape.
    """
    params: dict[str, np.ndarray] = {}
    missing: dict[str, None] = {}  # a set in order
    for path, shape in shapes.items():
        entry = _entry(table, path)
        stacked = path.startswith("blocks/")
        layers = range(shape[0]) if stacked else (0,)
        one = shape[1:] if stacked else shape
        arrays = []
        for layer in layers:
            try:
                arrays.append(_read(weights, entry, layer, path, one))
            except Missing as e:
                missing[e.args[0]] = None
        if len(arrays) == len(layers):
            params[path] = np.stack(arrays) if stacked else arrays[0]
    left = [name for name in weights.names if name not in weights.taken]
    unknown = [name for name in left if not name.startswith(tuple(ignored))]
    if missing or unknown:
        said = [
            f"{what} {_few(names)}"
            for what, names in (("lacks", missing), ("holds the unknown", unknown))
            if names
        ]
        raise UserError(
            f"{weights.where}: does not hold the weights of such a model: it {', and '.join(said)}."
        )
    return params


def to_torch(params: Mapping[str, np.ndarray], table: Table) -> dict[str, np.ndarray]:
    """Returns the tensors of a state dict by name: the inverse of `to_ours`.

    Args:
      params: ours, by path.
      table: for each module of ours, the name of theirs; no functions.
    """
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
            else:
                tensors[entry.format(layer)] = one
    tensors |= {name: np.concatenate(parts) for name, parts in thirds.items()}
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _entry(table: Table, path: str) -> Entry:
    """What a table says of one parameter: names are complete, with `weight` or `bias`."""
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
    if entry is None:
        return np.zeros(shape, np.float32)
    if callable(entry):
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
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
        return array if len(shape) == 4 else array.reshape(-1, array.shape[-1])
    if path.endswith("/kernel"):
        return array.T
    # Single vectors come as [D], [1, D] or [1, 1, D].
    return array.reshape(shape) if array.shape[-1:] == shape[-1:] == (array.size,) else array


def _to_theirs(path: str, array: np.ndarray) -> np.ndarray:
    if path == "patch_embedding/kernel":
        side = round((len(array) / 3) ** 0.5)
        return array.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
    if path == "head/probe":
        return array[None]
    return array.T if path.endswith("/kernel") else array


def _few(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return ", ".join(names[:_TOLD]) + more
