"""Candidates: examples of the input, before it is known whether they can be used."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An example of the input; it becomes one of the dataset if its image is usable.

    Attributes:
        id: unique within the split.
        file: name of the image, for the report.
        read: returns the encoded image. Raises FileNotFoundError if it is missing, or another of
            `files.READ_ERRORS`.
        features: all features but "image" and "id", JSON-serializable.
        problem: a reason to drop the example that is known before the image is read, or "".
        fields: further metadata, which filters can test (`--where`).
    """

    id: str
    file: str
    read: Callable[[], bytes]
    features: Mapping[str, Any]
    problem: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
