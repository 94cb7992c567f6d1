"""A toy source of numbers, and helpers for tests of the input pipeline."""

import cv2
import numpy as np

SIZE = 8


class Numbers:
    """A source whose example i is an image of gray value i with captions and label i.

    Args:
        count: number of examples.
        offset: value of the first example.
        files: store images as PNG files that are larger than SIZE, with a gradient.
        broken: indices of the examples whose images do not decode.
        captions: captions per example.
    """

    class_names: list[str] = []

    def __init__(self, count, offset=0, files=False, broken=(), captions=3):
        self._numbers = range(offset, offset + count)
        self._files = files
        self._broken = frozenset(broken)
        self._captions = captions

    def __len__(self):
        return len(self._numbers)

    def __getitem__(self, i):
        number = self._numbers[i]
        image = np.full((SIZE, SIZE, 3), number, np.uint8)
        if self._files:  # a gradient, so that crops differ
            image = np.tile(np.linspace(0, number, 24).astype(np.uint8), (20, 1))
            image = cv2.imencode(".png", image)[1].tobytes()
        if i in self._broken:
            image = b"not an image"
        captions = [f"{number} {'abc'[k]}" for k in range(self._captions)]
        return {"image": image, "captions": captions, "label": number, "id": str(number)}

    def __str__(self):
        return "dataset 'numbers'"


def indices(dataset, batches):
    return np.concatenate([dataset[t]["index"] for t in range(batches)]).tolist()


def assert_same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        assert batch[name].dtype == other[name].dtype
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def rows_of_host(host, hosts, batch_size=8):
    """Return the rows of a batch that a host reads: contiguous blocks of equal size."""
    each = batch_size // hosts
    return range(host * each, (host + 1) * each)
