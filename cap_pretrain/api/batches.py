"""Computing something for many images, in batches of one shape over the devices."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cap_pretrain.api.images import Item
from cap_pretrain.data.prefetch import DEFAULT_THREADS
from cap_pretrain.data.views import View
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import data_parallel, round_up


@dataclasses.dataclass(frozen=True)
class Work:
    """What to compute, and on which devices.

    Attributes:
        view: What the learner sees of an image.
        mesh: Its devices share each batch.
        batch_size: Images at a time; rounded up to a multiple of the devices.
        compute: Maps images uint8 [B, S, S, 3], or patches, on the devices, and the number of the
            first one, to an array [B, …] or a tree of them, each image independently of the others.
    """

    view: View
    mesh: Mesh
    batch_size: int
    compute: Callable[[jax.Array, int], Any]

    def size(self, count: int) -> int:
        """Return B: a power of two that holds `count` images, but at most the batch size."""
        fitting = 2 ** (count - 1).bit_length()
        return round_up(min(self.batch_size, fitting), data_parallel(self.mesh))


def computed(
    items: Sequence[Item], work: Work, unreadable: dict[str, str] | None = None
) -> Iterator[tuple[list[str], Any]]:
    """Yield the names [n] and results [n, …] of images, in batches.

    Args:
        items: The images.
        work: What to compute.
        unreadable: Receives the reason for each image that cannot be read, by its name; such images
            are left out. Without it, the first one raises UserError.
    """
    if not items:
        raise ValueError("images: the list is empty.")
    size = work.size(len(items))
    previous: tuple[list[str], Any] | None = None
    first = 0
    for batch in _read(items, work.view, size):
        names, squares = _readable(batch, unreadable)
        if not names:
            continue
        padded = np.zeros((size, *squares[0].shape), np.uint8)
        padded[: len(squares)] = squares
        with jax.set_mesh(work.mesh):
            placed = sharding.put_batch({"image": padded}, work.mesh)["image"]
            computing = names, work.compute(placed, first)
        if previous:  # fetched while the next batch is computed
            yield _fetched(*previous)
        previous, first = computing, first + len(names)
    if previous:
        yield _fetched(*previous)


def positive(batch_size: int) -> int:
    """Return a batch size; raise ValueError unless it is positive."""
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} is not positive.")
    return batch_size


def _read(
    items: Sequence[Item], view: View, size: int
) -> Iterator[list[tuple[Item, np.ndarray | str]]]:
    """Yield `size` items at a time with their squares, or why they cannot be read.

    The next batch is read while the caller computes.
    """
    with ThreadPoolExecutor(DEFAULT_THREADS) as pool:

        def begin(start: int) -> list[Future[np.ndarray | str]]:
            return [pool.submit(item.read, view) for item in items[start : start + size]]

        following = begin(0)
        try:
            for start in range(0, len(items), size):
                reading, following = following, begin(start + size)
                squares = [future.result() for future in reading]
                yield list(zip(items[start : start + size], squares, strict=True))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _readable(
    batch: list[tuple[Item, np.ndarray | str]], unreadable: dict[str, str] | None
) -> tuple[list[str], list[np.ndarray]]:
    """Return names and squares of the images that could be read; see `embed_batches`."""
    names, squares = [], []
    for item, found in batch:
        if not isinstance(found, str):
            names.append(item.name)
            squares.append(found)
        elif unreadable is None:
            raise UserError(f"{item.name}: {found}")
        else:
            unreadable[item.name] = found
    return names, squares


def _fetched(names: list[str], rows: Any) -> tuple[list[str], Any]:
    """Return names and their rows on this host, without those of padding."""
    return names, jax.tree.map(lambda array: np.asarray(array)[: len(names)], rows)
