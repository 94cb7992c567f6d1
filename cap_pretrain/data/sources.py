"""Where examples come from: random-access sequences of captioned (or labelled) images.

A source is a picklable sequence. `source[i]` is one example, as it is stored:

    {"image": bytes (an encoded file) | uint8 [H, W, 3] | float [1 + N, D] (features, see
     tools/extract_features.py), "captions": list[str] (may be empty),
     "label": int (-1: none), "id": str, "question": str}

and `source.class_names` lists the names of the labels (empty: none). A question (missing or "":
none) is what the captions answer; then label and class names are those of kinds of questions. A new
kind of source is one new file with such a class and one entry in `_GENERATED`; everything stored
goes through TFDS. It may have `without_image(i)`, the rest of an example where that takes less.
"""

import bisect
import contextlib
import importlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cap_pretrain.errors import UserError, did_you_mean

Example = dict[str, Any]

DEFAULT_FIELDS = {name: name for name in ("image", "captions", "label", "id", "question")}
"""Which feature of a stored dataset holds what; "a/b" is feature b inside of feature a."""

_GENERATED = {"scenes": "cap_pretrain.data.scenes:Scenes"}
_SPLIT_ALIASES = {"val": "validation", "validation": "val"}
_INFO_FILE = "dataset_info.json"
_FEATURES_FILE = "features.json"
_OPENING_THREADS = 16  # of files that may lie on a network disk


class Source(Protocol):
    """What the pipeline needs to know of a dataset."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def without_image(source: Source, index: int) -> Example:
    """An example for whom its image does not matter: it may be missing."""
    return getattr(source, "without_image", source.__getitem__)(index)


def open_source(
    name: str,
    split: str,
    *,
    image_size: int,
    data_dir: str = "",
    fields: Mapping[str, str] | None = None,
    scenes: Mapping[str, Any] | None = None,
) -> Source:
    """Opens a dataset by name or path.

    Args:
        name: "scenes"; or a path to a dataset in TFDS format (the folder with dataset_info.json, or
            a parent of it with one version or config); or the name of a prepared TFDS dataset, like
            "coco_captions/2014" or "coco_captions:1.1.0".
        split: "train", "train[:90%]", "train+test", … in the syntax of TFDS. "val" and "validation"
            stand for each other when only one of them exists.
        image_size: side of generated images, pixels; stored images keep their own size.
        data_dir: where TFDS datasets are looked for by name; empty: TFDS's own default.
        fields: overrides of DEFAULT_FIELDS.
        scenes: options of the generated dataset.

    Raises:
        UserError: no such dataset, split or field; an empty split; not stored in a format that
            allows random access; a file that is missing or damaged, as far as opening it tells.
    """
    if name in _GENERATED:
        module, cls = _GENERATED[name].split(":")
        generate = getattr(importlib.import_module(module), cls)
        return generate(split, image_size=image_size, **(scenes or {}))
    source = TfdsSource(find_dataset(name, data_dir), split, fields)
    source.check_files()
    return source


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """Splits "a:0.2+b:0.8" into [("a", 0.2), ("b", 0.8)]; a weight that is left out is 1.

    What follows the last colon is a weight only if it is a number, so paths and versions
    ("coco_captions:1.1.0") may contain colons. Paths may not contain "+".

    Raises:
        UserError: an empty name, or a weight that is not positive and finite.
    """
    return [_parse_weighted(part.strip(), text) for part in text.split("+")]


def _parse_weighted(part: str, text: str) -> tuple[str, float]:
    name, weight = part, 1.0
    before, colon, after = part.rpartition(":")
    if colon:
        with contextlib.suppress(ValueError):  # not a number: the colon belongs to the name
            name, weight = before.strip(), float(after)
    if not name:
        raise UserError(
            f"data.name {text!r}: a dataset name is empty; write name:weight+name:weight."
        )
    if not (weight > 0 and math.isfinite(weight)):
        raise UserError(f"data.name {text!r}: the weight of {name!r} is {weight}; it must be > 0.")
    return name, weight


def find_dataset(name: str, data_dir: str = "") -> Path:
    """Returns the folder that holds the dataset_info.json of a dataset given by path or name.

    A name is looked up as `data_dir/name`, with "name/config:version" for a config and version.
    Of several versions the newest is taken, as TFDS does.

    Raises:
        UserError: there is none, or there are several configs to choose from.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _version_folder(path)
    if path.is_absolute() or name.startswith(("~", ".")):
        raise UserError(f"dataset {name!r}: no such folder.{_near(path.name, path.parent)}")
    if not data_dir:
        import tensorflow_datasets as tfds

        data_dir = tfds.core.constants.DATA_DIR
    root = Path(data_dir).expanduser()
    path = root / name.replace(":", "/")
    if path.is_dir():
        return _version_folder(path)
    raise UserError(
        f"dataset {name!r}: no folder, and not prepared in {root}.{_near(name, root, _GENERATED)}\n"
        "Build one from your files with tools/build_dataset.py, or set data.dir."
    )


def _near(name: str, parent: Path, more: Iterable[str] = ()) -> str:
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    return did_you_mean(name, [*names, *more])


def _version_folder(path: Path) -> Path:
    if (path / _INFO_FILE).is_file():
        return path
    versions = [p.parent for p in path.glob(f"*/{_INFO_FILE}")]
    if versions:
        return max(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    configs = sorted({p.parent.parent for p in path.glob(f"*/*/{_INFO_FILE}")})
    if len(configs) == 1:
        return _version_folder(configs[0])
    if configs:
        names = ", ".join(p.name for p in configs)
        raise UserError(f"dataset {path}: holds several datasets or configs: {names}. Choose one.")
    raise UserError(
        f"dataset {path}: holds no {_INFO_FILE}, so it is not a finished TFDS dataset.\n"
        "Turn images and captions into one with tools/build_dataset.py."
    )


class TfdsSource:
    """A prepared TFDS dataset, read record by record without TensorFlow. A `Source`.

    Only its location is pickled: a worker process opens the files anew, without checking them all.
    Reading an example raises UserError when its file is damaged.
    """

    def __init__(self, folder: Path, split: str, fields: Mapping[str, str] | None = None):
        """Opens `split` of the dataset in `folder`. Raises UserError as open_source does."""
        self._arguments = (folder, split, fields)
        self._where = f"dataset {folder}"
        import tensorflow_datasets as tfds

        builder = self._open_builder(folder)
        self._paths, features = self._find_fields(builder.info.features, fields or {})
        self.class_names = list(getattr(features.get("label"), "names", None) or [])
        encoded = isinstance(features["image"], tfds.features.Image)
        skip = tfds.decode.SkipDecoding() if encoded else None
        self._records = self._open_split(builder, split, skip)

    def __reduce__(self):
        return TfdsSource, self._arguments

    def __str__(self) -> str:
        return f"{self._where}, split {self._arguments[1]!r}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            record = self._records[index]
            values = {field: _lookup(record, path) for field, path in self._paths.items()}
            captions = values.get("captions", [])
            return {
                "image": _image(values["image"]),
                "captions": [_text(c) for c in np.atleast_1d(np.asarray(captions, object))],
                "label": int(values.get("label", -1)),
                "id": _text(values.get("id", index)),
                "question": _text(values.get("question", "")),
            }
        except Exception as error:  # whatever the readers stumble over in the bytes of the file
            shard = self._shards[bisect.bisect_right(self._ends, index)]
            self._check_file(shard)  # tells more, if it is not this example alone
            raise UserError(
                f"{self}: example {index} in {Path(shard.filename).name} cannot be read "
                f"({_why(error)}); copy or build the dataset again."
            ) from error

    def check_files(self) -> None:
        """Opens every file of the split, without reading the examples.

        Raises:
            UserError: a file is missing, damaged, not readable, or holds other examples than
                dataset_info.json says.
        """
        with ThreadPoolExecutor(_OPENING_THREADS) as threads:
            for _ in threads.map(self._check_file, self._shards):
                pass

    def _check_file(self, shard: Any) -> None:
        path, count = Path(shard.filename), shard.examples_in_shard
        try:
            if not path.exists():
                raise UserError(f"{self._where}: {path.name} is missing; copy or build it again.")
            if self._is_array_record:
                count = _count_examples(path)
        except (OSError, RuntimeError) as error:
            why = _why(error) if str(error) else "it is cut off"
            raise UserError(
                f"{self._where}: {path.name} cannot be read ({why}); copy or build it again."
            ) from error
        if count != shard.examples_in_shard:
            raise UserError(
                f"{self._where}: {path.name} holds {count} examples, but {_INFO_FILE} says "
                f"{shard.examples_in_shard}; copy or build the dataset again."
            )

    def _open_builder(self, folder: Path) -> Any:
        import tensorflow_datasets as tfds

        at_fault = _INFO_FILE
        try:
            for at_fault in (_INFO_FILE, _FEATURES_FILE):
                json.loads((folder / at_fault).read_text(encoding="utf-8"))
            at_fault = f"{_INFO_FILE} or {_FEATURES_FILE}"
            # It prints that TensorFlow is not installed, where a feature asks for that.
            with contextlib.redirect_stdout(io.StringIO()):
                return tfds.builder_from_directory(folder)
        except Exception as error:  # whatever TFDS stumbles over in these files
            raise UserError(
                f"{self._where}: {at_fault} cannot be read ({_why(error)}); copy or build it again."
            ) from error

    def _find_fields(self, features: Any, chosen: Mapping[str, str]) -> tuple[dict, dict]:
        """Returns the path and the feature of each field that the dataset has."""
        leaves = dict(_leaves(features))
        paths = {**DEFAULT_FIELDS, **chosen}
        for field in chosen:
            if field not in DEFAULT_FIELDS:
                raise UserError(
                    f"data.fields: no field {field!r}.{did_you_mean(field, DEFAULT_FIELDS)}"
                )
        for field, path in paths.items():
            chosen_or_nested = path != DEFAULT_FIELDS[field] or any(
                leaf.startswith(f"{path}/") for leaf in leaves
            )
            if path not in leaves and (field == "image" or chosen_or_nested):
                raise UserError(
                    f"{self._where}: no feature {path!r} for the field {field!r}; it has "
                    f"{', '.join(sorted(leaves))}. Set data.fields.{field}."
                )
        found = {field: path for field, path in paths.items() if path in leaves}
        return found, {field: leaves[path] for field, path in found.items()}

    def _open_split(self, builder: Any, split: str, skip: Any) -> Sequence[dict]:
        known = builder.info.splits
        resolved = "+".join(self._resolve(part, known) for part in split.split("+"))
        try:
            info = known[resolved]
        except (ValueError, AssertionError) as error:
            why = str(error).splitlines()[-1]
            raise UserError(f"{self._where}: split {split!r} is not valid ({why}).") from error
        if not info.num_examples:
            raise UserError(f"{self._where}: split {split!r} is empty; choose another.")
        decoders = skip
        for part in reversed(self._paths["image"].split("/") if skip else ()):
            decoders = {part: decoders}
        try:
            records = builder.as_data_source(resolved, decoders=decoders)
        except NotImplementedError as error:
            raise UserError(
                f"{self._where}: stored as {builder.info.file_format.value}, without random access."
                "\nConvert it: tfds convert_format --out_file_format=array_record "
                f"--dataset_version_dir={builder.data_dir} --out_dir=NEW_FOLDER"
            ) from error
        self._shards = info.file_instructions
        self._ends = list(itertools.accumulate(shard.take for shard in self._shards))
        self._is_array_record = builder.info.file_format.value == "array_record"
        return records

    def _resolve(self, part: str, known: Mapping[str, Any]) -> str:
        name, bracket, rest = part.strip().partition("[")
        if name not in known and name != "all":
            alias = _SPLIT_ALIASES.get(name)
            if alias not in known:
                have = ", ".join(f"{n} ({known[n].num_examples})" for n in known)
                raise UserError(f"{self._where}: no split {name!r}; it has {have or 'none'}.")
            name = alias
        return name + bracket + rest


def _leaves(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields ("a/b", feature) for everything that is not itself a dictionary of features."""
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)  # what a Sequence repeats
        if hasattr(inner, "items"):
            yield from _leaves(inner, f"{prefix}{name}/")
        else:
            yield prefix + name, feature


def _lookup(record: Mapping[str, Any], path: str) -> Any:
    for part in path.split("/"):
        record = record[part]
    return record


def _image(value: Any) -> bytes | np.ndarray:
    if not isinstance(value, bytes | np.ndarray):
        raise TypeError("it has no image")
    return value


def _count_examples(path: Path) -> int:
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path), options="readahead_buffer_size:0")
    try:
        return reader.num_records()
    finally:
        reader.close()


def _why(error: Exception) -> str:
    """The first clause of what it says: ArrayRecord goes on and on, with all of the path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.strip().partition("\n")[0].partition(";")[0]


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
