"""Tars of images and captions as WebDataset and img2dataset write them, trained on as they are.

`data=wds:PATTERN` names tars, a folder of them, or a URL. One pass finds where the files of each
example lie (`tar_index`); then examples are read in any order. An example is the same as after
`cap build webdataset`: its image, the captions of its .txt or else of its .json, and an id.
"""

import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cap_pretrain.data import tar_examples
from cap_pretrain.data.examples import pair_id, texts
from cap_pretrain.data.sources import contents, numbered
from cap_pretrain.data.sources.base import DEFAULT_FIELDS, Example, mixed, parse_captions
from cap_pretrain.data.sources.numbered import Numbered
from cap_pretrain.data.sources.tar_index import Indexes
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.untrusted import parse_json

_BLOCK = 512  # bytes, of a tar
_TOGETHER = 2**20  # bytes between the files of an example up to which they are read at once
_AROUND = 64  # examples that are fetched together where nothing was planned
_TXT = "txt"


class WdsSource(Numbered):
    """A split of a WebDataset: a `Source` that reads uncompressed tars in place.

    Only the list of files is pickled; all processes of a machine map one file of indexes.

    Args:
        pattern: see `listing.find`.
        split: "train", or another one that the names of a folder's files say; with a slice as in
            "train[:90%]".
        fields: what holds the fields of an example: "txt" or keys of the .json. By default captions
            are those of the .txt, else of the .json's "caption", and the label is that of the .cls.
        cache: folder for indexes that cannot be kept beside the tars, and parts of remote tars.
        budget: most bytes of these parts.
    """

    def __init__(
        self,
        pattern: str,
        split: str,
        fields: Mapping[str, str] | None = None,
        cache: str = "",
        budget: float = 64e9,
    ):
        where = f"dataset wds:{pattern}"
        chosen = _chosen(fields or {}, where)
        listing = numbered.find_split(pattern, split, ".tar", where)
        self._setup(where, split, chosen, contents.Contents(listing, cache, budget), cache)

    def _setup(
        self,
        where: str,
        split: str,
        fields: Mapping[str, str],
        files: contents.Contents,
        cache: str,
    ) -> None:
        self._state = (where, split, fields, files, cache)
        joined = Indexes(files.listing.root, cache, where).load(
            files.listing.files, numbered.own_folder(files.listing, cache)
        )
        answers = numbered.answers_folder(files.listing, fields, cache)
        super().__init__(where, split, files.listing, joined.counts, answers)
        self._entries = joined.entries
        self._fields, self._contents = fields, files
        captions = fields.get("captions")
        self._captions = parse_captions(captions) if captions else []

    def __reduce__(self):
        return _again, self._state

    def read_ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch remote examples in the background; see `base.read_ahead`."""
        if self._contents.remote:
            self._contents.plan(
                (file, *self._bytes(file, first, end))
                for start, stop in ranges
                for file, first, end in self._spans(start, stop)
            )

    def _entries_of(self, file: int) -> np.ndarray:
        return self._entries[self._ends[file - 1] if file else 0 : self._ends[file]]

    def _bytes(self, file: int, first: int, end: int) -> tuple[int, int]:
        """Return the first byte of some examples of a file, and that after their last."""
        starts, stops = _extent(self._entries_of(file)[first:end])
        stop = min(int(stops.max()), self._listing.files[file].size)
        return min(max(0, int(starts.min())), stop), stop

    def _read(self, file: int, number: int, *, image: bool) -> Example:
        entry = self._entries_of(file)[number]
        found = self._files(file, number, entry, image=image)
        about = _parsed(found["json"])
        text = found["text"].decode("utf-8", "replace")
        example: Example = {"image": found["image"], "question": ""}
        example |= self._captions_of(text, about)
        for field in ("question", "label", "id"):
            value = self._value(field, text, about)
            if value is not None:
                example[field] = value
        if "label" not in example:
            example["label"] = int(found["label"].decode().strip() or -1)
        example["label"] = int(example["label"])
        if "id" not in example:
            url = about.get("url")
            example["id"] = (
                pair_id(url, example["captions"])
                if url and isinstance(url, str)
                else self._name(file, number, entry)
            )
        return example

    def _files(self, file: int, number: int, entry: np.void, *, image: bool) -> dict[str, bytes]:
        """Return the contents of an example's files, b"" for those it does not have."""
        size = self._listing.files[file].size
        places = {}
        for kind in ("image", "text", "json", "label"):
            start = int(entry["image"])
            start += 0 if kind == "image" else int(entry[kind]) * _BLOCK
            length = int(entry[f"{kind}_size"])
            if length and (kind != "image" or image):
                most = tar_examples.MAX_BYTES if kind == "image" else tar_examples.MAX_TEXT
                if not (start >= 0 and start + length <= size and length <= most):
                    raise ValueError("its index is damaged, so remove .cap_index and data.cache")
                places[kind] = start, start + length
        around = None
        if self._contents.remote:
            first = number - number % _AROUND
            around = self._bytes(file, first, first + _AROUND)
        found = dict.fromkeys(("image", "text", "json", "label"), b"")
        if not places:
            return found
        low, high = min(a for a, _ in places.values()), max(b for _, b in places.values())
        if high - low <= _TOGETHER + sum(b - a for a, b in places.values()):
            data = self._contents.read(file, low, high, around)
            return found | {kind: data[a - low : b - low] for kind, (a, b) in places.items()}
        return found | {
            kind: self._contents.read(file, *place, around) for kind, place in places.items()
        }

    def _captions_of(self, text: str, about: Mapping[str, Any]) -> dict[str, list]:
        if not self._captions:
            return {"captions": texts(text) or texts(about.get("caption"))}
        found = [texts(text if key == _TXT else about.get(key)) for key, _ in self._captions]
        if len(found) < 2:
            return {"captions": [caption for own in found for caption in own]}
        return mixed(found, [weight for _, weight in self._captions])

    def _value(self, field: str, text: str, about: Mapping[str, Any]) -> Any:
        """Return the value of a field that was chosen, or None."""
        key = self._fields.get(field)
        if key is None:
            return None
        value = text.strip() if key == _TXT else about.get(key)
        return value if value is None or field == "label" else str(value)

    def _name(self, file: int, number: int, entry: np.void) -> str:
        """Return SHARD/KEY, or SHARD/NUMBER if the name is too long to be read at once."""
        shard = self._listing.files[file].name.rpartition("/")[2].partition(".")[0]
        start = int(entry["image"])
        if not entry["named"] or start < _BLOCK:
            return f"{shard}/{number}"
        header = self._contents.read(file, start - _BLOCK, start)
        name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        return f"{shard}/{tar_examples.split(name)[0]}".encode("utf-8", "backslashreplace").decode()


def _again(*state: Any) -> WdsSource:
    source = WdsSource.__new__(WdsSource)
    source._setup(*state)
    return source


def _chosen(fields: Mapping[str, str], where: str) -> dict[str, str]:
    """Return the fields that are not the defaults; raises UserError for one that does not exist."""
    for field in fields:
        if field not in DEFAULT_FIELDS:
            raise UserError(
                f"data.fields: no field {field!r}.{did_you_mean(field, DEFAULT_FIELDS)}"
            )
    chosen = {field: key for field, key in fields.items() if key != DEFAULT_FIELDS[field]}
    if "image" in chosen:
        raise UserError(
            f"data.fields.image: {where} has one image an example, found by its suffix; leave the "
            "field as it is."
        )
    return chosen


def _parsed(data: bytes) -> Mapping[str, Any]:
    """Return the content of a .json; {} if it is none, as one that is damaged costs no image."""
    try:
        about = parse_json(data, "json") if data else {}
    except UserError:
        return {}
    return about if isinstance(about, dict) else {}


def _extent(entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the files of examples begin, the header before them included, and end."""
    image = entries["image"].astype(np.int64)
    starts, stops = [image], [image + entries["image_size"]]
    for kind in ("text", "json", "label"):
        there = entries[f"{kind}_size"] > 0
        start = np.where(there, image + entries[kind].astype(np.int64) * _BLOCK, image)
        starts.append(start)
        stops.append(np.where(there, start + entries[f"{kind}_size"], image))
    return np.min(starts, axis=0) - _BLOCK, np.max(stops, axis=0)
