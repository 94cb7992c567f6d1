"""An example to be."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An example to be, if its image turns out to be usable.

    Attributes:
        id: unique within the split.
        file: name of the image, for the report.
        read: returns the encoded image; raises FileNotFoundError if there is none, or another of
            files.READ_ERRORS.
        features: everything but "image" and "id", as JSON can have it.
        problem: a reason to drop the example that is known without reading it, or "".
        fields: what else is known of it, that filters may ask for.
    """

    id: str
    file: str
    read: Callable[[], bytes]
    features: Mapping[str, Any]
    problem: str = ""
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
