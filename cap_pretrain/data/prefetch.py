"""Prefetching of batches by threads or worker processes, which shut down cleanly.

`pipeline` decides what is in a batch; this module only decides when and where it is computed.
"""

import atexit
import gc
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags

from cap_pretrain.errors import UserError

# Those that the scheduler leaves this process, one of several on a machine with many GPUs.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
DEFAULT_THREADS = max(1, min(16, _CORES // 2))  # half: training needs some

Batch = dict[str, np.ndarray]


def iterate(
    dataset: grain.MapDataset,
    start: int = 0,
    stop: int | None = None,
    *,
    workers: int = 0,
    threads: int = DEFAULT_THREADS,
    prefetch: int = 4,
    plan: Callable[[int], None] | None = None,
) -> "Batches":
    """Iterate over elements start … stop - 1 of a dataset, preparing `prefetch` ahead of time.

    The dataset is that of `pipeline.train_dataset` or `pipeline.eval_batches`. Prefetching starts
    at once, so it overlaps with what the caller does before the first `next`; `close()` of the
    result stops it. The batches do not depend on `workers`, `threads` and `prefetch`.

    Worker processes, which share `prefetch`, import the main module, which therefore should import
    heavy packages late and guard its code by `if __name__ == "__main__"`. Without workers,
    `threads` prefetch; with 0, each element is computed on demand. Threads speed up image decoding,
    which releases the GIL, but slow down examples made in Python (`scenes`), which need workers.

    `plan` is called in this process with the number of the next element that the caller will take,
    first `start`; see `blocks.ReadAhead`.

    The iterator raises UserErrors of preparing an element, and one if a worker process was killed.
    """
    elements = dataset.slice(slice(start, stop))
    if plan:
        plan(start)
    workers = min(workers, len(elements))
    if not workers:
        buffer = max(prefetch, threads) if threads else 0
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
        iterator = iter(elements.to_iter_dataset(options))
    else:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags to pass them to the workers
            flags.FLAGS.mark_as_parsed()
        # Each worker prepares elements sequentially and keeps them in its own queue.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        processes = grain.MultiprocessingOptions(workers, max(prefetch // workers, 1))
        iterator = iter(
            elements.to_iter_dataset(options).mp_prefetch(processes, worker_init_fn=_follow_parent)
        )
        iterator.get_state()  # makes Grain set up now, not at the first `next`
        atexit.register(_free_shared_memory)  # runs before multiprocessing's own exit handlers
    iterator.start_prefetch()
    return Batches(iterator, start, plan)


_OPEN: "weakref.WeakSet[Batches]" = weakref.WeakSet()


class Batches(Iterator[Batch]):
    """An iterator over batches whose threads or worker processes end when it is closed."""

    def __init__(
        self,
        iterator: grain.DatasetIterator,
        start: int = 0,
        plan: Callable[[int], None] | None = None,
    ):
        self._iterator, self._next, self._plan = iterator, start, plan
        _OPEN.add(self)

    def __next__(self) -> Batch:
        try:
            batch = next(self._iterator)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise UserError(
                f"data.workers: {str(error).split('.')[0]}: most likely memory or shared memory "
                "(/dev/shm) ran out; give the machine or container more, or lower data.workers."
            ) from error
        self._next += 1
        if self._plan:
            self._plan(self._next)
        return batch

    def close(self) -> None:
        """Stop the threads and processes that prepare batches, if that is not done."""
        iterator, self._iterator = self._iterator, iter(())
        if hasattr(iterator, "close"):
            iterator.close()


def _free_shared_memory() -> None:
    """Free the last batches of worker processes, or Python would warn of leaked shared memory.

    A thread of Grain's frees it when the last reference goes. JAX keeps references to its inputs,
    tracebacks to local variables, and an iterator that was not closed to its prefetched batches.
    """
    for batches in list(_OPEN):
        batches.close()
    gc.collect()
    deletions = getattr(grain.multiprocessing.SharedMemoryArray, "_del_thread_pool", None)
    if deletions:
        deletions.apply(int)  # there is one thread, so this returns after all earlier deletions


def _follow_parent(_worker: int, _workers: int) -> None:
    """Tie the life of this worker process, whose index and count Grain passes, to its parent's.

    Signals to the whole process group (Ctrl-C, a scheduler's SIGTERM) are left to the parent, which
    needs batches until it has saved. If the parent is killed, the worker exits too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # only called in worker processes

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
