"""Parquet files with images and captions as Hugging Face datasets has them, trained on as they are.

`data=parquet:PATTERN` names files, a folder of them, or a URL. Only footers are read to open them;
a row group is a block, which is decoded as a whole (`row_groups`).
"""

import bisect
import dataclasses
import hashlib
import io
import itertools
import posixpath
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cap_pretrain.data.examples import pair_id, texts
from cap_pretrain.data.sources import arrow, footer, numbered, storage
from cap_pretrain.data.sources.base import DEFAULT_FIELDS, Example, mixed, parse_captions
from cap_pretrain.data.sources.contents import Contents, Recent
from cap_pretrain.data.sources.metadata import MAX_CLASSES, listed
from cap_pretrain.data.sources.numbered import Numbered
from cap_pretrain.data.sources.row_groups import MEMORY, Group, RowGroups, own_folder
from cap_pretrain.data.weights import Weight
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.telemetry import console
from cap_pretrain.untrusted import FREE_BYTES, MAX_RATIO, TooLargeError, parse_json, parsing

_THREADS = 16  # footers that are read at a time
_BATCH = 128  # rows that are decoded at a time
_PLACES = (2**20, 2**26)  # files, and bytes, of places of row groups that are kept in memory
_CAPTIONS = ("captions", "caption", "text", "txt")  # columns of captions, the first that is there


@dataclasses.dataclass(frozen=True)
class _Columns:
    """The columns that hold the fields of an example; "" if there is none."""

    image: str
    captions: tuple[tuple[str, Weight], ...]
    label: str
    id: str
    question: str
    url: str  # makes the id where there is no other

    def names(self, *, image: bool) -> list[str]:
        """Return all columns, or those without the image."""
        named = (*(name for name, _ in self.captions), self.label, self.id, self.question, self.url)
        return list(dict.fromkeys(filter(None, (self.image if image else "", *named))))


@dataclasses.dataclass(frozen=True)
class _Opened:
    """What the footer of a file says."""

    rows: tuple[int, ...]  # of each row group
    names: tuple[str, ...]  # of all columns
    schema: Any  # pyarrow.Schema
    unpacked: int  # bytes of the decompressed columns, as claimed


class ParquetSource(Numbered):
    """A split of images in Parquet files: a `Source` that reads them in place.

    Only the list of files is pickled; a worker process reads the footers again.

    Args:
        pattern: see `listing.find`.
        split: "train", or another one that the names of a folder's files say; with a slice as in
            "train[:90%]".
        fields: columns that hold the fields of an example. By default the image is in "image", or
            in the only column of images, and captions are in the first of _CAPTIONS.
        cache: folder for decoded row groups, and parts of remote files.
        budget: most bytes of each of the two.
    """

    def __init__(
        self,
        pattern: str,
        split: str,
        fields: Mapping[str, str] | None = None,
        cache: str = "",
        budget: float = 64e9,
    ):
        where = f"dataset parquet:{pattern}"
        found = numbered.find_split(pattern, split, ".parquet", where)
        files = Contents(found, cache, budget)
        self._setup(where, split, dict(fields or {}), files, (cache, budget), None)

    def _setup(
        self,
        where: str,
        split: str,
        fields: Mapping[str, str],
        files: Contents,
        kept: tuple[str, float],
        decoded: Path | None,
    ) -> None:
        self._contents, self._listing = files, files.listing
        self._where = where
        with ThreadPoolExecutor(_THREADS) as threads:
            opened = list(threads.map(self._open, range(len(files.listing.files))))
        answers = numbered.answers_folder(files.listing, fields, kept[0])
        counts = [sum(one.rows) for one in opened]
        super().__init__(where, split, files.listing, counts, answers)
        self._group_ends = [list(itertools.accumulate(one.rows)) for one in opened]
        self._columns = _columns(opened[0].schema, fields, where)
        for one, file in zip(opened, files.listing.files, strict=True):
            for name in self._columns.names(image=True):
                if name not in one.names:
                    raise UserError(
                        f"{where}: {file.name} has no column {name!r}; name files with the same "
                        "columns."
                    )
        self.class_names = _class_names(opened[0].schema, self._columns.label, where)
        self._places: Recent[np.ndarray] = Recent(
            self._find_groups, _PLACES[0], lambda places: places.nbytes, _PLACES[1]
        )
        unpacked = sum(one.unpacked for one in opened)
        if unpacked > MEMORY and not decoded:
            decoded = self._decoded_folder(kept[0], min(unpacked, kept[1]))
        self._groups = RowGroups(self._decode, decoded, kept[1])
        self._state = (where, split, fields, files, kept, decoded)

    def __reduce__(self):
        return _again, self._state

    def _decoded_folder(self, cache: str, most: float) -> Path:
        """Return the folder for decoded row groups of up to `most` bytes."""
        about = [str(self._listing.root), self._columns]
        about += [(file.name, file.size, file.stamps) for file in self._listing.files]
        digest = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
        folder = own_folder(storage.cache_folder(cache) / f"parquet-{digest}")
        console.say(
            f"{self._where}: row groups are decoded once and kept in {folder}, up to "
            f"{most / 1e9:,.1f} GB (data.cache)."
        )
        return folder

    def block_bounds(self, size: int) -> np.ndarray:
        """Return where row groups begin, of any size."""
        del size
        files = zip([0, *self._ends], self._group_ends, strict=False)
        ends = [begin + end for begin, own in files for end in own]
        return np.append(np.int64(0), self._within(ends))

    def read_ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch remote row groups in the background; see `base.read_ahead`."""
        if not self._contents.remote:
            return
        groups: dict[tuple[int, int], None] = {}
        for start, stop in ranges:
            for file, first, end in self._spans(start, stop):
                ends = self._group_ends[file]
                last = bisect.bisect_right(ends, end - 1)
                for number in range(bisect.bisect_right(ends, first), last + 1):
                    groups[file, number] = None
        wanted = [g for g in groups if not self._groups.kept(Group(*g, image=True))]
        self._contents.plan([self._spans_of(*group) for group in wanted])

    def _spans_of(self, file: int, number: int) -> Callable[[], Iterable[tuple[int, int, int]]]:
        def spans() -> list[tuple[int, int, int]]:
            with parsing(self._listing.path(file)):
                first, stop = self._places(file)[number].tolist()
            return [(file, first, stop)]

        return spans

    def _find_groups(self, file: Hashable) -> np.ndarray:
        """Return the first byte and the one after the last of a file's row groups, int64 [n, 2]."""
        assert isinstance(file, int)
        size = self._listing.files[file].size
        tail = self._contents.read(file, max(0, size - footer.TAIL), size)
        start = max(0, size - footer.TAIL - footer.size(tail))
        places = footer.row_groups(self._contents.read(file, start, size - footer.TAIL))
        return np.array([(min(a, size), min(b, size)) for a, b in places], np.int64)

    def _open(self, file: int) -> _Opened:
        with parsing(self._listing.path(file)):
            found = self._file(file)
            metadata, size = found.metadata, self._listing.files[file].size
            rows = tuple(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
            if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
                raise ValueError("its numbers of rows disagree")
            unpacked = arrow.unpacked(found)
            if unpacked > FREE_BYTES + MAX_RATIO * size:
                raise TooLargeError(f"it decompresses to over {MAX_RATIO} times its size")
            schema = found.schema_arrow
            return _Opened(rows, tuple(schema.names), schema, unpacked)

    def _file(self, file: int) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(_Reader(self._contents, file))

    def _decode(self, group: Group) -> Any:
        import pyarrow as pa

        names = self._columns.names(image=group.image)
        found = self._file(group.file)
        left = FREE_BYTES + MAX_RATIO * self._listing.files[group.file].size
        batches = []
        for batch in found.iter_batches(
            batch_size=_BATCH, row_groups=[group.number], columns=names, use_threads=False
        ):
            batches.append(arrow.decoded(batch))
            left -= batches[-1].nbytes
            if left < 0:
                raise TooLargeError(f"its rows have over {MAX_RATIO} times its size")
        return pa.Table.from_batches(batches)

    def _read(self, file: int, number: int, *, image: bool) -> Example:
        ends = self._group_ends[file]
        group = bisect.bisect_right(ends, number)
        row = number - (ends[group - 1] if group else 0)
        table = self._groups(Group(file, group, image))
        columns = self._columns
        values = {name: _value(table.column(name), row) for name in columns.names(image=image)}
        captions = _captions(values, columns)
        label = values.get(columns.label)
        example = {
            "image": _image(values.get(columns.image)) if image else b"",
            **captions,
            "label": -1 if label is None else int(label),
            "question": str(values.get(columns.question) or ""),
        }
        given, url = values.get(columns.id), values.get(columns.url)
        if given is not None:
            example["id"] = str(given)
        elif url and isinstance(url, str):
            example["id"] = pair_id(url, captions["captions"])
        else:
            name = self._listing.files[file].name
            example["id"] = f"{posixpath.basename(name).removesuffix('.parquet')}/{number}"
        return example


def _again(*state: Any) -> ParquetSource:
    source = ParquetSource.__new__(ParquetSource)
    source._setup(*state)
    return source


class _Reader(io.RawIOBase):
    """A file of a dataset for PyArrow."""

    def __init__(self, contents: Contents, file: int):
        self._contents, self._file, self._at = contents, file, 0
        self._size = contents.listing.files[file].size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._at + size, self._size)
        data = self._contents.read(self._file, self._at, stop)
        self._at += len(data)
        return data


def _columns(schema: Any, fields: Mapping[str, str], where: str) -> _Columns:
    """Choose the columns of all fields; raises UserError if one that was chosen is missing."""
    names = schema.names
    for field in fields:
        if field not in DEFAULT_FIELDS:
            raise UserError(
                f"data.fields: no field {field!r}.{did_you_mean(field, DEFAULT_FIELDS)}"
            )
    chosen = {field: name for field, name in fields.items() if name != DEFAULT_FIELDS[field]}
    captions = parse_captions(chosen.get("captions", "captions"))
    if "captions" not in chosen:
        captions = [(name, Weight(((0.0, 1.0),))) for name in _CAPTIONS if name in names][:1]
    image = chosen.get("image") or _image_column(schema)
    wanted = [*((f, n) for f, n in chosen.items() if f != "captions"), ("image", image)]
    for field, name in [*wanted, *(("captions", name) for name, _ in captions)]:
        if name not in names:
            raise UserError(
                f"{where}: no column {name!r} for the field {field!r}; it has "
                f"{listed(sorted(names))}. Set data.fields.{field}."
            )
    one = {f: chosen.get(f) or (f if f in names else "") for f in ("label", "id", "question")}
    if "label" not in chosen and one["label"] and not _is_integer(schema.field("label").type):
        one["label"] = ""
    return _Columns(
        image, tuple(captions), **one, url="" if one["id"] or "url" not in names else "url"
    )


def _image_column(schema: Any) -> str:
    """Return "image", or the only column that may hold images."""
    import pyarrow as pa

    def may_be(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [field.name for field in schema if may_be(field.type)]
    return found[0] if len(found) == 1 and "image" not in schema.names else "image"


def _is_integer(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind)


def _class_names(schema: Any, label: str, where: str) -> list[str]:
    """Return the names of classes that Hugging Face datasets stores with a column."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if not (stored and label):
        return []
    about: Any = parse_json(stored, f"{where}: its metadata of Hugging Face")
    for part in ("info", "features", label, "names"):
        about = about.get(part) if isinstance(about, dict) else None
    names = about if isinstance(about, Collection) and not isinstance(about, str | dict) else []
    return [str(name) for name in names] if len(names) <= MAX_CLASSES else []


def _value(column: Any, row: int) -> Any:
    try:
        return column[row].as_py()
    except UnicodeDecodeError:
        (value,) = arrow.values(column.slice(row, 1).combine_chunks())
        return value


def _image(value: Any) -> bytes:
    """Return the bytes of an image; b"" if it has none, which counts as broken."""
    data = value.get("bytes") if isinstance(value, dict) else value
    return data if isinstance(data, bytes) else b""


def _captions(values: Mapping[str, Any], columns: _Columns) -> dict[str, list]:
    """Return `captions` and, if several columns hold them, what `mixed` does."""
    found = [texts(values.get(name)) for name, _ in columns.captions]
    if len(found) < 2:
        return {"captions": [caption for own in found for caption in own]}
    return mixed(found, [weight for _, weight in columns.captions])
