"""Compile programs in the background, while the main thread does something else."""

import concurrent.futures
import threading
from typing import Any

import jax

_THREAD = "compile ahead"


class Ahead:
    """A jitted function that is traced now, for arguments of given shapes, and compiled meanwhile.

    Call it like the function. Arguments of other shapes, types or shardings than the `abstract`
    ones are left to the function itself, which compiles for them then.
    """

    def __init__(self, fn: Any, *abstract: Any):
        self._fn, self._abstract = fn, abstract
        lowered = fn.lower(*abstract)  # traces, which the main thread must do
        pool = concurrent.futures.ThreadPoolExecutor(1, _THREAD)
        self._compiled = pool.submit(lowered.compile)
        pool.shutdown(wait=False)
        self._program: Any = None

    def __call__(self, *args: Any) -> Any:
        """Run the program, waiting until it is compiled."""
        if self._program is None:
            self._program = self._compiled.result() if self._fits(args) else self._fn
        return self._program(*args)

    def _fits(self, args: Any) -> bool:
        given, planned = jax.tree.leaves(args), jax.tree.leaves(self._abstract)
        trees: list[Any] = [jax.tree.structure(each) for each in (args, self._abstract)]
        return trees[0] == trees[1] and all(map(_same, given, planned))


def compiling() -> bool:
    """Return whether a program is being compiled; Python waits for it before the process ends."""
    return any(thread.name.startswith(_THREAD) for thread in threading.enumerate())


def _same(array: Any, abstract: Any) -> bool:
    return (
        array.shape == abstract.shape
        and array.dtype == abstract.dtype
        and array.sharding.is_equivalent_to(abstract.sharding, array.ndim)
    )
