"""Datasets that TFDS has prepared, read record by record without TensorFlow."""

import bisect
import contextlib
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cap_pretrain.data.sources.base import DEFAULT_FIELDS, INFO_FILE, Example, parse_mixture
from cap_pretrain.data.sources.storage import Copies, retried, why
from cap_pretrain.errors import UserError, did_you_mean

_SPLIT_ALIASES = {"val": "validation", "validation": "val"}
_FEATURES_FILE = "features.json"
_OPENING_THREADS = 16  # of files that may lie on a network disk


class TfdsSource:
    """A prepared TFDS dataset, read record by record without TensorFlow. A `Source`.

    Only its location is pickled: a worker process opens the files anew, without checking them all.
    Reading an example raises UserError when its file is damaged. Errors that may pass are waited
    for (see `storage.retried`).
    """

    def __init__(self, folder: Path | Copies, split: str, fields: Mapping[str, str] | None = None):
        """Opens `split` of the dataset in `folder`. Raises UserError as open_source does."""
        self._arguments = (folder, split, fields)
        self._where = f"dataset {folder}"
        self._copies = folder if isinstance(folder, Copies) else None
        import tensorflow_datasets as tfds

        builder = self._open_builder(self._copies.path if self._copies else folder)
        self._paths, self._captions, features = self._find_fields(
            builder.info.features, fields or {}
        )
        self.class_names = list(getattr(features.get("label"), "names", None) or [])
        encoded = isinstance(features["image"], tfds.features.Image)
        skip = tfds.decode.SkipDecoding() if encoded else None
        self._wanted = {*self._paths.values(), *(path for path, _ in self._captions)}
        self._leaves = dict(_leaves(builder.info.features))
        self._plain = all(_is_plain(self._leaves[path]) for path in self._wanted)
        self._open_records = self._open_split(builder, split, skip)
        self._records = self._open_records()

    def __reduce__(self):
        return TfdsSource, self._arguments

    def __str__(self) -> str:
        return f"{self._where}, split {self._arguments[1]!r}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = self._shards[bisect.bisect_right(self._ends, index)]
        if self._copies:
            self._fetch(shard)
        try:
            record = self._parsed(retried(lambda: self._read(index)))
            values = {field: _single(record[path]) for field, path in self._paths.items()}
            return {
                "image": _image(values["image"]),
                **self._captions_of(record),
                "label": int(values.get("label", -1)),
                "id": _text(values.get("id", index)),
                "question": _text(values.get("question", "")),
            }
        except Exception as error:  # whatever the readers stumble over in the bytes of the file
            self._check_file(shard)  # tells more, if it is not this example alone
            raise UserError(
                f"{self}: example {index} in {Path(shard.filename).name} cannot be read "
                f"({why(error)}); copy or build the dataset again."
            ) from error

    def _parsed(self, record: bytes) -> dict[str, Any]:
        """The values of the features that are wanted, by path.

        Plain ones are taken as they are: TFDS would take longer for them than to read the record.
        A record without some features, or with them under other names, is for TFDS to judge.
        """
        if self._plain:
            from tensorflow_datasets.proto import tf_example_pb2

            stored = tf_example_pb2.Example.FromString(record).features.feature
            if all(path in stored for path in self._leaves):
                return {path: _stored(stored[path]) for path in self._wanted}
        example = self._records.dataset_info.features.deserialize_example_np(
            record, decoders=self._records.decoders
        )
        return {path: _lookup(example, path) for path in self._wanted}

    def _read(self, index: int) -> bytes:
        try:
            return self._records[index]
        except RuntimeError:
            self._records = self._open_records()  # ArrayRecord's readers do not recover
            raise

    def _captions_of(self, record: Mapping[str, Any]) -> dict[str, list]:
        """Returns `captions` of an example, and of several features `weights`."""
        found = [
            [_text(c) for c in np.atleast_1d(np.asarray(record[path], object))]
            for path, _ in self._captions
        ]
        if len(found) < 2:
            return {"captions": [caption for captions in found for caption in captions]}
        found = [[c for c in captions if c.strip()] for captions in found]
        return {
            "captions": [caption for captions in found for caption in captions],
            "weights": [
                weight / len(captions)
                for captions, (_, weight) in zip(found, self._captions, strict=True)
                for _ in captions
            ],
        }

    def check_files(self) -> None:
        """Opens every file of the split, without reading the examples.

        Remote files are only looked for, and room for copies of them: each is opened when it has
        been copied.

        Raises:
            UserError: a file is missing, damaged, not readable, or holds other examples than
                dataset_info.json says.
        """
        if self._copies:
            names = [Path(shard.filename).name for shard in self._shards]
            for name in names:
                if name not in self._copies:
                    raise self._missing(name)
            self._copies.check_room(names)
            return
        with ThreadPoolExecutor(_OPENING_THREADS) as threads:
            for _ in threads.map(self._check_file, self._shards):
                pass

    def _fetch(self, shard: Any) -> None:
        """Makes sure that a remote file has its copy, which is opened once."""
        name = Path(shard.filename).name
        if not self._copies.has(name):
            self._copies.fetch(name)
            self._check_file(shard)

    def _missing(self, name: str) -> UserError:
        return UserError(f"{self._where}: {name} is missing; copy or build it again.")

    def _check_file(self, shard: Any) -> None:
        path, count = Path(shard.filename), shard.examples_in_shard
        try:
            if not path.exists():
                raise self._missing(path.name)
            if self._is_array_record:
                count = retried(lambda: _count_examples(path))
        except (OSError, RuntimeError) as error:
            reason = why(error) if str(error) else "it is cut off"
            raise UserError(
                f"{self._where}: {path.name} cannot be read ({reason}); copy or build it again."
            ) from error
        if count != shard.examples_in_shard:
            raise UserError(
                f"{self._where}: {path.name} holds {count} examples, but {INFO_FILE} says "
                f"{shard.examples_in_shard}; copy or build the dataset again."
            )

    def _open_builder(self, folder: Path) -> Any:
        import tensorflow_datasets as tfds

        at_fault = INFO_FILE
        try:
            for at_fault in (INFO_FILE, _FEATURES_FILE):
                json.loads(retried((folder / at_fault).read_bytes).decode("utf-8"))
            at_fault = f"{INFO_FILE} or {_FEATURES_FILE}"
            # It prints that TensorFlow is not installed, where a feature asks for that.
            with contextlib.redirect_stdout(io.StringIO()):
                return tfds.builder_from_directory(folder)
        except Exception as error:  # whatever TFDS stumbles over in these files
            raise UserError(
                f"{self._where}: {at_fault} cannot be read ({why(error)}); copy or build it again."
            ) from error

    def _find_fields(self, features: Any, chosen: Mapping[str, str]) -> tuple[dict, list, dict]:
        """Returns the path of each field that the dataset has, (path, weight) of those of captions,
        and the features of the others.
        """
        leaves = dict(_leaves(features))
        paths = {**DEFAULT_FIELDS, **chosen}
        for field in chosen:
            if field not in DEFAULT_FIELDS:
                raise UserError(
                    f"data.fields: no field {field!r}.{did_you_mean(field, DEFAULT_FIELDS)}"
                )
        captions = parse_mixture(paths["captions"], "data.fields.captions")
        single = [(field, path) for field, path in paths.items() if field != "captions"]
        for field, path in [*single, *(("captions", path) for path, _ in captions)]:
            chosen_or_nested = paths[field] != DEFAULT_FIELDS[field] or any(
                leaf.startswith(f"{path}/") for leaf in leaves
            )
            if path not in leaves and (field == "image" or chosen_or_nested):
                raise UserError(
                    f"{self._where}: no feature {path!r} for the field {field!r}; it has "
                    f"{', '.join(sorted(leaves))}. Set data.fields.{field}."
                )
        found = {field: path for field, path in single if path in leaves}
        captions = [(path, weight) for path, weight in captions if path in leaves]
        return found, captions, {field: leaves[path] for field, path in found.items()}

    def _open_split(self, builder: Any, split: str, skip: Any) -> Callable[[], Sequence[bytes]]:
        """Returns what opens the records of a split, of which it checks all but the files."""
        import tensorflow_datasets as tfds

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
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        records = functools.partial(
            builder.as_data_source, resolved, decoders=decoders, deserialize_method=raw
        )
        try:
            records()
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


def _is_plain(feature: Any) -> bool:
    """Whether records have it as a list of values that need no decoding, of none or one sequence.

    Of several they have it under other names.
    """
    import tensorflow_datasets as tfds

    plain = (tfds.features.Image, tfds.features.Text, tfds.features.ClassLabel)
    return isinstance(getattr(feature, "feature", feature), plain)


def _stored(feature: Any) -> list:
    """The values of a tf.train.Feature."""
    kind = feature.WhichOneof("kind")
    return list(getattr(feature, kind).value) if kind else []


def _single(value: Any) -> Any:
    """What is stored alone."""
    if isinstance(value, list):
        (value,) = value
    return value


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


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
