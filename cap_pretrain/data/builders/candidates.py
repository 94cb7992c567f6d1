"""Candidates: examples of the input, before it is known whether they can be used."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An example of the input; it becomes one of the dataset if its image is usable."""

    id: str  # unique within the split
    file: str  # name of the image, for the report
    read: Callable[[], bytes]  # the encoded image; raises FileNotFoundError or other READ_ERRORS
    features: Mapping[str, Any]  # all but "image" and "id", JSON-serializable
    problem: str = ""  # a reason to drop the example that is known before the image is read, or ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for filters (`--where`)
    held: int = 0  # bytes that it keeps in memory until it is checked
    left_out: tuple[str, ...] = ()  # reasons why texts are not in `features`, for the report
