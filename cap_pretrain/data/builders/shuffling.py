"""TFDS's shuffling of data that does not fit in memory, without TensorFlow.

Beyond a gigabyte of records (less here), TFDS sorts them through a thousand temporary files. TFDS
4.9 opens these with TensorFlow, which need not be installed; here they are opened with Python.
"""

import contextlib
import os
import resource
from collections.abc import Iterator
from types import SimpleNamespace

from tensorflow_datasets.core import shuffle

_IN_MEMORY = 64 * 2**20  # bytes; small, so that builds of any size need about the same memory
_OPEN_FILES = shuffle.BUCKETS_NUMBER + 1024


class _NeverRaisedError(Exception):
    """Stands in for an error of TensorFlow's."""


# Everything that the module `shuffle` uses of TensorFlow.
_PLAIN_FILES = SimpleNamespace(
    io=SimpleNamespace(
        gfile=SimpleNamespace(GFile=open, exists=os.path.exists, remove=os.remove),
    ),
    errors=SimpleNamespace(ResourceExhaustedError=_NeverRaisedError),
)


@contextlib.contextmanager
def with_plain_files() -> Iterator[None]:
    """Make TFDS shuffle through Python's files, and raise the limit of open files for them."""
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
