"""Batches prepared ahead of time: by threads or worker processes, which end when they should.

What is in a batch is settled before (see `pipeline`); here is only when it is computed, and where.
"""

import atexit
import gc
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from cap_pretrain.errors import UserError

DEFAULT_THREADS = max(1, min(16, (os.cpu_count() or 2) // 2))
"""Half of the cores: the other half is for the training itself."""

Batch = dict[str, np.ndarray]


def iterate(
    dataset: grain.MapDataset,
    start: int = 0,
    stop: int | None = None,
    *,
    workers: int = 0,
    threads: int = DEFAULT_THREADS,
    prefetch: int = 4,
) -> "Batches":
    """Iterates over elements start … stop - 1 of a dataset, preparing them ahead of time.

    What comes out does not depend on `workers`, `threads` and `prefetch`. Preparation begins at
    once, so that it overlaps with whatever the caller does before the first `next`.

    Args:
        dataset: of `pipeline.train_dataset` or `pipeline.eval_batches`.
        start: the first element, a step number.
        stop: where to end; None for the end of the dataset.
        workers: number of worker processes. They import the main module, so it should import what
            is heavy late, and guard what it does by `if __name__ == "__main__"`.
        threads: number of threads that prepare elements when there are no workers; 0 computes each
            element when it is asked for. They speed up decoding, which releases the GIL; examples
            made in Python (`scenes`) want worker processes, and come slower with more threads.
        prefetch: number of elements kept ready, shared out among the workers.

    Returns:
        An iterator; `close()` it to end its workers at once.

    Raises:
        UserError: (from the iterator) whatever user error preparing an element met, in any process;
            a worker that was killed.
    """
    elements = dataset.slice(slice(start, stop))
    workers = min(workers, len(elements))
    if not workers:
        buffer = max(prefetch, threads) if threads else 0
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
        iterator = iter(elements.to_iter_dataset(options))
    else:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags, to pass them on to the workers
            flags.FLAGS.mark_as_parsed()
        # Each worker prepares one element after the other and keeps them in its own queue.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        processes = grain.MultiprocessingOptions(workers, max(prefetch // workers, 1))
        iterator = iter(
            elements.to_iter_dataset(options).mp_prefetch(processes, worker_init_fn=_follow_parent)
        )
        iterator.get_state()  # has Grain make what it otherwise makes at the first `next`
        atexit.register(_free_shared_memory)  # runs before what multiprocessing registered earlier
    iterator.start_prefetch()
    return Batches(iterator)


_OPEN: "weakref.WeakSet[Batches]" = weakref.WeakSet()


class Batches(Iterator[Batch]):
    """An iterator over batches that has threads or worker processes to end when it is closed."""

    def __init__(self, iterator: grain.DatasetIterator):
        self._iterator = iterator
        _OPEN.add(self)

    def __next__(self) -> Batch:
        try:
            return next(self._iterator)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise UserError(
                f"data.workers: {str(error).split('.')[0]}: memory or shared memory (/dev/shm) ran "
                "out, most likely; give the machine or container more, or lower data.workers."
            ) from error

    def close(self) -> None:
        """Ends the threads and processes that prepare batches."""
        self._iterator.close()
        self._iterator = iter(())


def _free_shared_memory() -> None:
    """Frees the last batches of worker processes, which would be called leaked otherwise.

    They lie in shared memory that the last one to hold them frees, in a thread of Grain's: JAX
    holds what it computed with, the traceback of an error the local variables on its way, and an
    iterator that nobody has closed what it has fetched ahead.
    """
    for batches in list(_OPEN):
        batches.close()
    gc.collect()
    deletions = getattr(grain.multiprocessing.SharedMemoryArray, "_del_thread_pool", None)
    if deletions:
        deletions.apply(int)  # one thread: returns when all that came before are done


def _follow_parent(worker: int, workers: int) -> None:
    """Makes this worker process live as long as its parent wants, and no longer than it lives.

    Signals meant for the whole process group (Ctrl-C, a scheduler's SIGTERM) are the parent's to
    answer: it needs batches until it has saved. A parent that was killed leaves no workers behind.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent():
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
