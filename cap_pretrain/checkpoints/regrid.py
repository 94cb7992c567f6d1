"""Restoring a state for images of another size: a ViT has a position embedding for each patch.

The embeddings of a checkpoint are resampled to the patches of the present `data.image_size`, and so
are their moving average and what the optimizer keeps of them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from cap_pretrain import rules
from cap_pretrain.checkpoints.manifest import Leaves
from cap_pretrain.models.vit import resample_positions

POSITIONS = "encoder/positions"
PARAMETER = f"learner/params/{POSITIONS}"
TINY = 1e-30  # avoids 0 / 0 where there were no gradients
FACTORS = ("v_row", "v_col", "v")  # of the second moment, in `optax.FactoredState`


class Grids(NamedTuple):
    """The shapes [patches, width] of position embeddings, in a checkpoint and at present."""

    old: tuple[int, int]
    new: tuple[int, int]

    def describe(self) -> str:
        """Return a line for the log."""
        old, new = (f"{side} x {side}" for side in self.sides)
        return (
            f"The position embeddings of the checkpoint, of {old} patches, are resampled to {new}, "
            "with their average and what the optimizer keeps of them."
        )

    @property
    def sides(self) -> tuple[int, int]:
        """Patches along a side."""
        return math.isqrt(self.old[0]), math.isqrt(self.new[0])

    def resample(self, x: jax.Array) -> jax.Array:
        """Resample [patches, width] to the present patches; values >= 0 remain >= 0."""
        old, new = self.sides
        return resample_positions(x.astype(jnp.float32), (old, old), (new, new)).astype(x.dtype)


def grids(saved: Leaves, wanted: Leaves) -> Grids | None:
    """Return the grids of the entries of a manifest and of a state; None if they are equal.

    None, too, if a side has no such embeddings, or they differ in more than the grid.
    """
    shapes = [tuple(leaves.get(PARAMETER, {}).get("shape", ())) for leaves in (saved, wanted)]
    if shapes[0] == shapes[1] or any(len(shape) != 2 for shape in shapes):
        return None
    old, new = shapes
    square = all(math.isqrt(n) ** 2 == n for n in (old[0], new[0]))
    return Grids(old, new) if square and old[1] == new[1] else None


def as_saved(target: Any, saved: Leaves) -> Any:
    """Return `target` with all that belongs to position embeddings in the shapes of a manifest."""

    def shape(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = rules.path_string(path)
        there = tuple(saved.get(name, {}).get("shape", leaf.shape))
        if not name.endswith(POSITIONS) or there == leaf.shape:
            return leaf
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(there, leaf.dtype, sharding=whole)

    return jax.tree_util.tree_map_with_path(shape, target)


def resampled(items: Any, target: Any, found: Grids) -> Any:
    """Return restored `items` in the shapes and with the shardings of `target`."""
    arrays, wanted = rules.flatten(items), rules.flatten(target)

    def convert(path: Any, leaf: jax.Array) -> jax.Array:
        make: Callable[[Any], jax.Array]
        name = rules.path_string(path)
        start, _, kind = name.removesuffix(f"/{POSITIONS}").rpartition("/")
        names = {each: f"{start}/{each}/{POSITIONS}" for each in FACTORS}
        if not name.endswith(POSITIONS):
            return leaf
        of_leaf: Any = leaf
        if kind in FACTORS and set(names.values()) <= arrays.keys():
            of_leaf = {each: arrays[path] for each, path in names.items()}
            make = lambda parts: _factors(parts, wanted[name].shape, kind, found)
        else:
            make = found.resample
        return jax.jit(make, out_shardings=wanted[name].sharding)(of_leaf)

    return jax.tree_util.tree_map_with_path(convert, items)


def _factors(
    parts: dict[str, jax.Array], shape: tuple[int, ...], kind: str, found: Grids
) -> jax.Array:
    """Return a part of the second moment of resampled embeddings, as `scale_by_factored_rms`.

    It keeps the means over rows and over columns (Shazeer and Stern 2018, 1804.04235, algorithm 4)
    or, of small matrices, the moment itself, and of the others an array of one element.

    Args:
        parts: The former parts, by their names in `FACTORS`.
        shape: The shape that the part must have.
        kind: The name of the part.
        found: The grids.
    """
    if shape == (1,):
        return jnp.zeros(1, parts[kind].dtype)
    moment = parts["v"]
    if moment.shape == (1,):
        rows, columns = parts["v_row"], parts["v_col"]
        moment = jnp.outer(rows / jnp.maximum(jnp.mean(rows), TINY), columns)
        moment = moment if _by_patch(found.old) else moment.T
    moment = found.resample(moment)
    if kind == "v":
        return moment
    return jnp.mean(moment, axis=1 if (kind == "v_row") == _by_patch(found.new) else 0)


def _by_patch(shape: tuple[int, int]) -> bool:
    """Return whether the rows of the factors of [patches, width] are those of the patches."""
    return shape[0] <= shape[1]  # `optax` takes the mean over the largest dimension as rows
