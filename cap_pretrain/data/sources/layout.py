"""Where a dataset in TFDS format stores what an example is made of."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cap_pretrain.data.regions import Region, checked
from cap_pretrain.data.sources.base import DEFAULT_FIELDS, Example, mixed, parse_captions
from cap_pretrain.data.sources.metadata import listed
from cap_pretrain.data.weights import Weight
from cap_pretrain.errors import UserError, did_you_mean

_REGIONS = ("phrases", "boxes")  # features that hold regions (see builders/regions.py)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a dataset stores the fields of an example.

    `paths` maps each field that the dataset has, but captions, to its feature; `captions` lists
    (path, weight) of the features that hold captions; `leaves` maps the path of every feature to
    it.
    """

    paths: dict[str, str]
    captions: list[tuple[str, Weight]]
    leaves: dict[str, Any]

    def feature(self, field: str) -> Any:
        """Return the TFDS feature of a field, or None."""
        return self.leaves[self.paths[field]] if field in self.paths else None

    @property
    def has_regions(self) -> bool:
        """Whether there are the features that hold regions, of the types that we write.

        Others of these names may be something else, such as the boxes of TFDS, whose order differs.
        """
        phrases, boxes = (self.leaves.get(name) for name in _REGIONS)
        return _is_texts(phrases) and _is_numbers(boxes)

    def wanted(self) -> set[str]:
        """Return the paths of all features that an example is made of."""
        regions = _REGIONS if self.has_regions else ()
        return {*self.paths.values(), *(path for path, _ in self.captions), *regions}

    def example(self, record: Mapping[str, Any], index: int) -> Example:
        """Make example `index` from the values of its features by path."""
        values = {field: _single(record[path]) for field, path in self.paths.items()}
        regions = {"regions": _regions(record)} if self.has_regions else {}
        return regions | {
            "image": _image(values["image"]),
            **self._captions_of(record),
            "label": int(values.get("label", -1)),
            "id": _text(values.get("id", index)),
            "question": _text(values.get("question", "")),
        }

    def _captions_of(self, record: Mapping[str, Any]) -> dict[str, list]:
        """Return `captions` and, if several features hold them, what `mixed` does."""
        found = [
            [_text(c) for c in np.atleast_1d(np.asarray(record[path], object))]
            for path, _ in self.captions
        ]
        if len(found) < 2:
            return {"captions": [caption for captions in found for caption in captions]}
        found = [[c for c in captions if c.strip()] for captions in found]
        return mixed(found, [weight for _, weight in self.captions])


def find_fields(features: Any, chosen: Mapping[str, str], where: str) -> Layout:
    """Find the features of all fields, of which `chosen` overrides `DEFAULT_FIELDS`."""
    leaves = dict(leaves_of(features))
    paths = {**DEFAULT_FIELDS, **chosen}
    for field in chosen:
        if field not in DEFAULT_FIELDS:
            raise UserError(
                f"data.fields: no field {field!r}.{did_you_mean(field, DEFAULT_FIELDS)}"
            )
    captions = parse_captions(paths["captions"])
    single = [(field, path) for field, path in paths.items() if field != "captions"]
    for field, path in [*single, *(("captions", path) for path, _ in captions)]:
        chosen_or_nested = paths[field] != DEFAULT_FIELDS[field] or any(
            leaf.startswith(f"{path}/") for leaf in leaves
        )
        if path not in leaves and (field == "image" or chosen_or_nested):
            raise UserError(
                f"{where}: no feature {path!r} for the field {field!r}; it has "
                f"{listed(sorted(leaves))}. Set data.fields.{field}."
            )
    found = {field: path for field, path in single if path in leaves}
    return Layout(found, [(path, weight) for path, weight in captions if path in leaves], leaves)


def leaves_of(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ("a/b", feature) for each feature that is not itself a dictionary of features."""
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)  # the element of a Sequence
        if hasattr(inner, "items"):
            yield from leaves_of(inner, f"{prefix}{name}/")
        else:
            yield prefix + name, feature


def is_plain(feature: Any) -> bool:
    """Return whether records store a feature as plain values: a scalar or sequence, not nested."""
    import tensorflow_datasets as tfds

    plain = (tfds.features.Image, tfds.features.Text, tfds.features.ClassLabel)
    element = getattr(feature, "feature", feature)
    of_numbers = element is not feature and element.shape == () and element.np_dtype == np.float32
    return isinstance(element, plain) or of_numbers


def _is_texts(feature: Any) -> bool:
    import tensorflow_datasets as tfds

    kinds = type(feature), type(getattr(feature, "feature", None))
    return kinds == (tfds.features.Sequence, tfds.features.Text)


def _is_numbers(feature: Any) -> bool:
    """Return whether a feature is a flat sequence of float32."""
    import tensorflow_datasets as tfds

    element = getattr(feature, "feature", None)
    return (
        type(feature) is tfds.features.Sequence
        and isinstance(element, tfds.features.Tensor)
        and (element.shape, element.np_dtype) == ((), np.float32)
    )


def stored_values(feature: Any) -> list:
    """Return the values of a tf.train.Feature."""
    kind = feature.WhichOneof("kind")
    return list(getattr(feature, kind).value) if kind else []


def _single(value: Any) -> Any:
    """Unpack a list of one value; anything else is returned unchanged."""
    if isinstance(value, list):
        (value,) = value
    return value


def lookup(record: Mapping[str, Any], path: str) -> Any:
    """Return the value of the feature at a path such as "a/b"."""
    return functools.reduce(lambda value, part: value[part], path.split("/"), record)


def _regions(record: Mapping[str, Any]) -> list[Region]:
    """Return the regions of a record that are valid."""
    phrases, boxes = (record[name] for name in _REGIONS)
    return checked(map(_text, phrases), np.asarray(boxes, np.float64).reshape(-1, 4).tolist())


def _image(value: Any) -> bytes | np.ndarray:
    if not isinstance(value, bytes | np.ndarray):
        raise TypeError("it has no image")
    return value


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
