"""What formats have in common that are read as a stream: images with captions, one at a time."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from cap_pretrain.data.builders import base
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.units import Part


class Pairs(base.ImageDataset, skip_registration=True):
    """Images with captions that are read as they are written, and never all in memory."""

    def __init__(self, parts: Mapping[str, Sequence[Part]], origin: str, **kwargs: Any):
        """`parts` hold the candidates of each split."""
        self._parts, self._origin = parts, origin
        super().__init__(**kwargs)

    def splits(self) -> dict[str, None]:
        return dict.fromkeys(self._parts)

    def parts(self, split: str) -> Sequence[Part]:
        return self._parts[split]

    def features(self) -> dict[str, Any]:
        return {"captions": tfds.features.Sequence(tfds.features.Text())}

    def description(self) -> str:
        return f"Images with captions, built from {self._origin}."


def pair_id(url: str, captions: Sequence[str]) -> str:
    """The id of an image by its URL and captions: the same, whichever way both were stored.

    Captions belong to it, as lists of URLs have some twice, with other words.
    """
    return hashlib.sha256("\n".join([url.strip(), *captions]).encode()).hexdigest()[:20]


def candidate(
    id: str,
    file: str,
    captions: Sequence[str],
    read: Callable[[], bytes],
    problem: str = "",
    fields: Mapping[str, Any] | None = None,
) -> Candidate:
    """An image with captions; one without any is dropped."""
    problem = problem or ("" if captions else "without captions")
    return Candidate(id, file, read, {"captions": list(captions)}, problem, fields or {})


def lost(id: str, file: str, problem: str) -> Candidate:
    """Something that is not understood as an example, for the report."""
    return candidate(id, file, (), bytes, problem)
