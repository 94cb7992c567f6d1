"""TFDS's shuffling of what does not fit in memory, without TensorFlow.

What is too much for memory, a gigabyte for TFDS and less here, lies in a thousand files until it is
in order. TFDS 4.9 opens these by TensorFlow, which need not be installed; here they are opened as
any others.
"""

import contextlib
import os
import resource
from collections.abc import Iterator
from types import SimpleNamespace

from tensorflow_datasets.core import shuffle

_IN_MEMORY = 64 * 2**20  # bytes, so that builds of any size need about as much
_OPEN_FILES = shuffle.BUCKETS_NUMBER + 1024


class _Never(Exception):
    """Stands for an error of TensorFlow's."""


# All that the module `shuffle` has of TensorFlow.
_PLAIN_FILES = SimpleNamespace(
    io=SimpleNamespace(
        gfile=SimpleNamespace(GFile=open, exists=os.path.exists, remove=os.remove),
    ),
    errors=SimpleNamespace(ResourceExhaustedError=_Never),
)


@contextlib.contextmanager
def with_plain_files() -> Iterator[None]:
    """Within, TFDS keeps its files by itself, and may have that many open."""
    tensorflow, most_in_memory = shuffle.tf, shuffle.MAX_MEM_BUFFER_SIZE
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = limits
    if soft != resource.RLIM_INFINITY and soft < _OPEN_FILES:
        most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    shuffle.tf = _PLAIN_FILES
    shuffle.MAX_MEM_BUFFER_SIZE = min(_IN_MEMORY, most_in_memory)
    try:
        yield
    finally:
        shuffle.tf, shuffle.MAX_MEM_BUFFER_SIZE = tensorflow, most_in_memory
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
