"""Shared parts of formats that are read as a stream of image-caption pairs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cap_pretrain.data.builders import base
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.units import Part


class Pairs(base.ImageDataset):
    """Images with captions, of which only a few are in memory at a time; `parts` are by split."""

    def __init__(self, parts: Mapping[str, Sequence[Part]], origin: str, **kwargs: Any):
        self._parts = parts
        super().__init__(**kwargs, origin=origin)

    def splits(self) -> dict[str, None]:
        """Return None by split: the number of candidates is not known in advance."""
        return dict.fromkeys(self._parts)

    def parts(self, split: str) -> Sequence[Part]:
        """Return the parts of a split."""
        return self._parts[split]


def candidate(
    example_id: str,
    file: str,
    captions: Sequence[str],
    read: Callable[[], bytes],
    problem: str = "",
    fields: Mapping[str, Any] | None = None,
    held: int = 0,
) -> Candidate:
    """Return a candidate with captions, marked as dropped if there are none; see `Candidate`."""
    problem = problem or ("" if captions else "without captions")
    features = {"captions": list(captions)}
    return Candidate(example_id, file, read, features, problem, fields or {}, held)


def dropped(example_id: str, file: str, problem: str) -> Candidate:
    """Return a dropped candidate for input that is not a valid example, for the report."""
    return candidate(example_id, file, (), bytes, problem)
