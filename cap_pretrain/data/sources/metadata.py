"""The metadata of a TFDS dataset, checked before TFDS reads it.

TFDS imports whatever class features.json names, so a dataset could run code that lies beside it.
Only the classes in `CLASSES` reach TFDS. docs/security.md lists the limits.
"""

import contextlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from cap_pretrain.data.sources.base import INFO_FILE
from cap_pretrain.data.sources.storage import retried, why
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import TooLargeError, open_regular

_FEATURES_FILE = "features.json"
_FEATURES = "tensorflow_datasets.core.features."
CLASSES = frozenset(
    _FEATURES + name
    for name in (
        *("features_dict.FeaturesDict", "sequence_feature.Sequence", "dataset_feature.Dataset"),
        *("image_feature.Image", "labeled_image.LabeledImage", "bounding_boxes.BBoxFeature"),
        *("text_feature.Text", "translation_feature.Translation"),
        *("translation_feature.TranslationVariableLanguages", "class_label_feature.ClassLabel"),
        *("scalar.Scalar", "tensor_feature.Tensor", "feature.Tensor"),
    )
)
"""Feature classes of TFDS that may be read; its audio and video start ffmpeg, which is not ours."""

MAX_METADATA = 2**22
"""Most bytes of dataset_info.json, features.json and of each list of class names."""
MAX_FILES = 2**15
"""Most files of records of a split; TFDS takes a millisecond for each."""
MAX_CLASSES = 2**20
"""Most classes of a label without names: TFDS makes a name for each."""

# How JSON names a feature's class: in protocol buffers (both spellings), and before TFDS 4.5.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
# A name is a placeholder without a format, since {SPLIT:>99999999999} would fill the memory.
_TEMPLATE = re.compile(r"(?:[^{}]|\{[A-Z_]+\})*")


def open_builder(folder: Path, where: str) -> Any:
    """Return the TFDS builder of a folder, whose classes and splits have been checked.

    Raises UserError, which begins with `where`, if the metadata is missing, malformed, beyond the
    limits, or names a class that is not in `CLASSES`.
    """
    import tensorflow_datasets as tfds

    at_fault = INFO_FILE
    try:
        info = json.loads(_read(folder / INFO_FILE))
        at_fault = _FEATURES_FILE
        _check_classes(json.loads(_read(folder / _FEATURES_FILE)), where, at_fault)
        for at_fault in sorted(file.name for file in folder.glob("*.labels.txt")):
            _read(folder / at_fault)
        at_fault = f"{INFO_FILE} or {_FEATURES_FILE}"
        _check_classes(info.get("features"), where, INFO_FILE)
        # TFDS prints that TensorFlow is not installed if a feature asks for it.
        with contextlib.redirect_stdout(io.StringIO()):
            builder = tfds.builder_from_directory(folder)
        _check_names(builder.info.features)
        for name, split in builder.info.splits.items():
            _check_split(name, split, folder)
        return builder
    except UserError:
        raise
    except Exception as error:  # TFDS raises nearly anything on corrupt files
        raise UserError(
            f"{where}: {at_fault} cannot be read ({why(error)}); copy or build it again."
        ) from error


def listed(names: Sequence[str]) -> str:
    """Return names from data for a message: at most 20 of them."""
    return ", ".join([*names[:20], "…"] if len(names) > 20 else names)


def _read(path: Path) -> str:
    """Return the text of a regular file of at most MAX_METADATA bytes."""

    def read() -> bytes:
        with open_regular(path) as file:
            return file.read(MAX_METADATA + 1)

    data = retried(read)
    if len(data) > MAX_METADATA:
        raise TooLargeError(f"it has over {MAX_METADATA} bytes")
    return data.decode("utf-8")


def _check_classes(features: Any, where: str, file: str) -> None:
    for name in _classes(features):
        if name not in CLASSES:
            raise UserError(
                f"{where}: {file} names the class {name[:200]!r}, which is not among the features "
                "that are read, and was not imported; copy or build it again without it."
            )


def _classes(value: Any) -> Iterator[str]:
    """Yield the names of all classes in features as JSON; their strings may hold JSON, too."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, list):
        for inner in value:
            yield from _classes(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in _CLASS_KEYS and isinstance(inner, str):
                yield inner
            else:
                yield from _classes(inner)


def _check_names(features: Any) -> None:
    """Check the names of features, and the number of classes of every label."""
    for name, feature in features.items():
        _check_name("feature", name)
        inner = getattr(feature, "feature", feature)  # the element of a Sequence
        if hasattr(inner, "items"):
            _check_names(inner)
        else:
            count = getattr(inner, "num_classes", 0)
            if not isinstance(count, int) or not 0 <= count <= MAX_CLASSES:
                raise ValueError(f"the feature {name!r} has {count!r:.50} classes")


def _check_split(name: str, split: Any, folder: Path) -> None:
    """Check that the sizes are possible, and that the files lie in the folder."""
    _check_name("split", name)
    lengths = split.shard_lengths
    if len(lengths) > MAX_FILES:
        raise ValueError(f"split {name!r} has {len(lengths)} files, over {MAX_FILES}")
    for count in (*lengths, sum(lengths)):
        if not 0 <= count < 2**53:
            raise ValueError(f"shardLengths of split {name!r} has {count} examples")
    template = split.filename_template
    if not _TEMPLATE.fullmatch(template.template):
        raise ValueError(f"filepathTemplate of split {name!r} is not a template of file names")
    path = PurePath(template.sharded_filepath(shard_index=0, num_shards=max(1, len(lengths))))
    if not str(path).removeprefix(str(folder)).isprintable():
        raise ValueError(f"filepathTemplate of split {name!r} is not printable")
    if ".." in path.parts[len(folder.parts) :] or not path.is_relative_to(folder):
        raise ValueError(f"filepathTemplate of split {name!r} leads out of the folder")


def _check_name(what: str, name: str) -> None:
    if len(name) > 200 or not name.isprintable():
        raise ValueError(f"the name of a {what} is too long or not printable: {name[:80]!r}")
