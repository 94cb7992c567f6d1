"""Prepared TFDS datasets, read record by record without TensorFlow."""

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cap_pretrain.data.sources import passes
from cap_pretrain.data.sources.array_record import ArrayRecords, RangedRecords, count_records
from cap_pretrain.data.sources.base import (
    INFO_FILE,
    Example,
    NoSplitError,
    file_bounds,
)
from cap_pretrain.data.sources.layout import find_fields, is_plain, lookup, stored_values
from cap_pretrain.data.sources.metadata import listed, open_builder
from cap_pretrain.data.sources.ranges import Ranges
from cap_pretrain.data.sources.storage import Copies, retried, why
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import NotRegularError

_SPLIT_ALIASES = {"val": "validation", "validation": "val"}
_OPENING_THREADS = 16  # the files may lie on a network disk


class TfdsSource:
    """A split of a prepared TFDS dataset: a `Source` that needs no TensorFlow.

    `folder` holds dataset_info.json, or local copies of a remote one; `split`, `fields` and errors
    are as for `open_source`. With `ranges`, the files of records are not copied as a whole, but in
    blocks of `block` examples. Only the arguments are pickled; a worker process opens the files
    again, without checking them all. Reading an example from a corrupt file raises UserError.
    Transient errors are retried (see `storage.retried`).
    """

    def __init__(
        self,
        folder: Path | Copies,
        split: str,
        fields: Mapping[str, str] | None = None,
        ranges: Ranges | None = None,
        block: int = 256,
    ):
        import tensorflow_datasets as tfds

        self._arguments = (folder, split, fields, ranges, block)
        self._where = f"dataset {folder}"
        self._copies = folder if isinstance(folder, Copies) else None
        self.answers = self._copies and passes.answers_folder(self._copies.path, fields)
        self._ranged = ranges is not None
        builder = open_builder(folder.path if isinstance(folder, Copies) else folder, self._where)
        self._layout = find_fields(builder.info.features, fields or {}, self._where)
        label = self._layout.feature("label")
        self.class_names: list[str] = list(getattr(label, "names", None) or [])
        encoded = isinstance(self._layout.feature("image"), tfds.features.Image)
        encoded_path = self._layout.paths["image"] if encoded else None
        self._wanted = self._layout.wanted()
        self._plain = all(is_plain(self._layout.leaves[path]) for path in self._wanted)
        self.splits = tuple(builder.info.splits)
        opened = _open_split(builder, split, encoded_path, self._where)
        self._shards, self._is_array_record = opened.shards, opened.file_format == "array_record"
        self._ends = list(itertools.accumulate(shard.take for shard in self._shards))
        self._features, self._decoders = builder.info.features, opened.decoders
        self._open_records = opened.open_records
        if ranges is not None:
            _check_ranged(opened, self._where)
            self._open_records = functools.partial(RangedRecords, self._shards, ranges, block)
        self._records: Any = self._open_records()

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
        self._fetch(shard)
        try:
            record = self._parse(retried(lambda: self._read(index)))
            example = self._layout.example(record, index)
            if self.class_names and not -1 <= example["label"] < len(self.class_names):
                raise ValueError(
                    f"its label is {example['label']} of {len(self.class_names)} classes"
                )
            return example
        except UserError:
            raise
        except Exception as error:  # the readers raise nearly anything on corrupt bytes
            if not self._ranged:
                self._check_file(shard)  # gives a better reason if the whole file is corrupt
            raise UserError(
                f"{self}: example {index} in {Path(shard.filename).name} cannot be read "
                f"({why(error)}); copy or build the dataset again."
            ) from error

    def block_bounds(self, size: int) -> np.ndarray:
        """Return where blocks of at most `size` examples begin, anew at each file."""
        return file_bounds(self._ends, size)

    def read_ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch ranges of examples in the background (see `base.read_ahead`)."""
        if self._ranged:
            self._records.read_ahead(ranges)

    @functools.cached_property
    def example_bytes(self) -> float:
        """Mean stored bytes of an example, from the sizes of the files."""
        paths = {Path(s.filename): s.examples_in_shard for s in self._shards}
        sizes = (self._copies.size(p.name) if self._copies else p.stat().st_size for p in paths)
        return sum(sizes) / sum(paths.values())

    def _parse(self, record: bytes) -> dict[str, Any]:
        """Return the values of the wanted features by path.

        Plain features are read directly, because TFDS takes longer to parse them than to read the
        record. A record that lacks some features, or names them differently, is left to TFDS.
        """
        if self._plain:
            from tensorflow_datasets.proto import tf_example_pb2

            stored = tf_example_pb2.Example.FromString(record).features.feature
            if all(path in stored for path in self._layout.leaves):
                return {path: stored_values(stored[path]) for path in self._wanted}
        example = self._features.deserialize_example_np(record, decoders=self._decoders)
        return {path: lookup(example, path) for path in self._wanted}

    def _read(self, index: int) -> bytes:
        try:
            return self._records[index]
        except RuntimeError:
            self._records = self._open_records()  # ArrayRecord's readers do not recover
            raise

    def check_files(self) -> None:
        """Open every file of the split, without reading the examples.

        Remote files, which are opened when they have been copied, are only looked up, and the disk
        is checked for room. Raises UserError if a file is missing, corrupt, not readable, or its
        number of examples differs from dataset_info.json.
        """
        if self._copies:
            names = [Path(shard.filename).name for shard in self._shards]
            for name in names:
                if name not in self._copies:
                    raise _missing(self._where, name)
            if not self._ranged:
                self._copies.check_room(names)
            return
        with ThreadPoolExecutor(_OPENING_THREADS) as threads:
            for _ in threads.map(self._check_file, self._shards):
                pass

    def _fetch(self, shard: Any) -> None:
        """Copy a remote file unless there is a copy, and check it once."""
        name = Path(shard.filename).name
        if self._copies and not self._ranged and not self._copies.has(name):
            self._copies.fetch(name)
            self._check_file(shard)

    def _check_file(self, shard: Any) -> None:
        path, count = Path(shard.filename), shard.examples_in_shard
        try:
            if not path.is_file():
                if path.exists():
                    raise NotRegularError("it is not a file")
                raise _missing(self._where, path.name)
            if self._is_array_record:
                count = retried(lambda: count_records(path))
        except (OSError, RuntimeError) as error:
            reason = why(error) if str(error) else "it is truncated"
            raise UserError(
                f"{self._where}: {path.name} cannot be read ({reason}); copy or build it again."
            ) from error
        if count != shard.examples_in_shard:
            raise UserError(
                f"{self._where}: {path.name} holds {count} examples, but {INFO_FILE} says "
                f"{shard.examples_in_shard}; copy or build the dataset again."
            )


@dataclasses.dataclass(frozen=True)
class _Split:
    """An opened split: its files, and a function that opens its records.

    TFDS decodes records with `decoders`, which leave images encoded.
    """

    open_records: Callable[[], Sequence[bytes]]
    shards: Sequence[Any]  # tfds.core.utils.shard_utils.FileInstruction
    file_format: str
    decoders: Any


def _open_split(builder: Any, split: str, encoded_path: str | None, where: str) -> _Split:
    """Open a split without checking files; images at `encoded_path` (None: arrays) stay encoded."""
    import tensorflow_datasets as tfds

    known = builder.info.splits
    resolved = "+".join(_resolve(part, known, where) for part in split.split("+"))
    try:
        info = known[resolved]
    except (ValueError, AssertionError) as error:
        reason = str(error).splitlines()[-1]
        raise UserError(f"{where}: split {split!r} is not valid ({reason}).") from error
    if not info.num_examples:
        raise UserError(f"{where}: split {split!r} is empty; choose another.")
    decoders: Any = None
    if encoded_path is not None:
        decoders = tfds.decode.SkipDecoding()
        for part in reversed(encoded_path.split("/")):
            decoders = {part: decoders}
    shards, stored_as = info.file_instructions, builder.info.file_format.value
    if stored_as == "array_record":
        return _Split(functools.partial(ArrayRecords, shards), shards, stored_as, decoders)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    open_records = functools.partial(
        builder.as_data_source, resolved, decoders=decoders, deserialize_method=raw
    )
    convert = (
        "\nConvert it: tfds convert_format --out_file_format=array_record "
        f"--dataset_version_dir={builder.data_dir} --out_dir=NEW_FOLDER"
    )
    if stored_as == "parquet":  # which TFDS reads as a whole, now
        for shard in shards:
            if not Path(shard.filename).is_file():
                raise _missing(where, Path(shard.filename).name)
    try:
        count = len(open_records())
    except NotImplementedError as error:
        raise UserError(
            f"{where}: stored as {stored_as}, without random access.{convert}"
        ) from error
    except Exception as error:
        raise UserError(f"{where}: {stored_as} cannot be read ({why(error)}).{convert}") from error
    if count != info.num_examples:
        raise UserError(
            f"{where}: split {split!r} has {info.num_examples} examples, but TFDS reads {count} "
            f"from {stored_as}.{convert}"
        )
    return _Split(open_records, shards, stored_as, decoders)


def _check_ranged(split: _Split, where: str) -> None:
    if split.file_format != "array_record":
        raise UserError(
            f"{where}: stored as {split.file_format}, which is not read in ranges; set "
            "data.order=global, or convert it to array_record."
        )


def _resolve(part: str, known: Mapping[str, Any], where: str) -> str:
    """Replace the name of a split, as in "val[:10%]", by the alias that the dataset knows."""
    name, bracket, rest = part.strip().partition("[")
    if name not in known and name != "all":
        alias = _SPLIT_ALIASES.get(name)
        if alias is None or alias not in known:
            have = listed([f"{n} ({known[n].num_examples})" for n in known])
            message = f"{where}: no split {name!r}; it has {have or 'none'}."
            raise NoSplitError(message, known)
        name = alias
    return name + bracket + rest


def _missing(where: str, name: str) -> UserError:
    return UserError(f"{where}: {name} is missing; copy or build it again.")
