"""What examples are made of: captions, and ids that do not depend on the format."""

import hashlib
from collections.abc import Sequence
from typing import Any


def texts(values: Any) -> list[str]:
    """Return the strings in a list (or a single value), stripped, without empty ones."""
    values = values if isinstance(values, list) else [values]
    return [value.strip() for value in values if isinstance(value, str) and value.strip()]


def encoded(text: str) -> bytes:
    """Return a text in UTF-8, with whatever bytes for lone surrogates."""
    return text.encode("utf-8", "surrogatepass")


def pair_id(url: str, captions: Sequence[str]) -> str:
    """Return an id made of an image's URL and captions, the same for every input format.

    The captions are included because lists of URLs contain some URLs twice, with other captions.
    """
    return hashlib.sha256(encoded("\n".join([url.strip(), *captions]))).hexdigest()[:20]
