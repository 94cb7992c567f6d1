"""Base class of all formats: checks images, counts dropped examples and writes TFDS records."""

import argparse
import collections
import dataclasses
import functools
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from cap_pretrain.data import images
from cap_pretrain.data.builders import units
from cap_pretrain.data.builders.arguments import check_splits
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.duplicates import without_duplicates
from cap_pretrain.data.builders.files import READ_ERRORS, AmbiguousNameError
from cap_pretrain.data.builders.filters import (
    MAX_CAPTION,
    MAX_ID,
    Filters,
    RejectedError,
    kept_captions,
)
from cap_pretrain.data.builders.report import DROPPED, SplitReport
from cap_pretrain.data.builders.report_page import page
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import is_text, legible, mended

_THREADS = os.cpu_count() or 1
_AHEAD = 4 * _THREADS  # candidates in memory at a time

MAX_HELD = 2**27
"""Bytes of candidates in memory at which no more are read; a candidate may be larger."""


class _Info(tfds.core.DatasetInfo):
    """A `DatasetInfo` that does not look for its content in Google's storage."""

    def initialize_from_bucket(self) -> None:
        """Do nothing; TFDS would leave an empty temporary folder, even without network."""


class ImageDataset(tfds.core.GeneratorBasedBuilder):
    """Base class of all formats.

    A subclass yields candidates; this class checks, filters and writes them. An image is stored
    unchanged if all decoders agree on it, and re-encoded otherwise (`images.to_plain`). A candidate
    that cannot be used is dropped and counted in `report`; it does not stop the build. A subclass
    implements `add_arguments`, `from_arguments`, `splits` and either `candidates` or `parts`; those
    without captions also `features` and `description`.

    `build` works in the folder `data_dir`, and `origin` names the input files. Raises UserError if
    there are filters for captions but the format has no captions.
    """

    VERSION = tfds.core.Version("1.0.0")
    HOMEPAGE = ""
    CITATION = ""
    # TFDS looks here for checksums of downloads. There are none, and its default search needs
    # importlib_resources, which TFDS does not declare as a dependency.
    code_path = None

    def __init_subclass__(cls, skip_registration: bool = True, **kwargs: Any) -> None:
        """Keep formats out of the registry of TFDS, where all would be called "dataset"."""
        super().__init_subclass__(skip_registration=skip_registration, **kwargs)

    def __init__(self, name: str, data_dir: Path, filters: Filters | None = None, *, origin: str):
        self.name = name
        self._origin = origin
        self.report: dict[str, SplitReport] = {}
        self._folder, self._filters = Path(data_dir), filters or Filters()
        check_splits(self.splits(), origin)
        features = self.features()
        if self._filters.on_captions and ("captions" not in features or "question" in features):
            raise UserError(
                "--min_words and similar options filter captions, which this format lacks."
            )
        super().__init__(data_dir=data_dir)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declare the command-line options of this format."""
        raise NotImplementedError

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, **kwargs: Any) -> "ImageDataset":
        """Construct the builder from parsed options; `kwargs` are name, data_dir and filters.

        Raises UserError if a file is missing or not in the expected format.
        """
        raise NotImplementedError

    def splits(self) -> Mapping[str, int | None]:
        """Return the number of candidates by split; None if only `parts` can tell."""
        raise NotImplementedError

    def candidates(self, split: str) -> Iterable[Candidate]:
        """Yield the candidates of a split in a fixed order; not used if `parts` is overridden."""
        raise NotImplementedError

    def parts(self, split: str) -> Sequence[units.Part]:
        """Return the parts of a split in a fixed order, such as the shards it is read from."""

        def count() -> int:
            number = self.splits()[split]
            assert number is not None, "formats without counts override `parts`"
            return number

        return [units.Part(functools.partial(self.candidates, split), count)]

    def features(self) -> dict[str, Any]:
        """Return the TFDS features besides "image" and "id"; by default the captions."""
        return {"captions": tfds.features.Sequence(tfds.features.Text())}

    def description(self) -> str:
        """Return one sentence about the dataset, for its metadata."""
        return f"Images with captions, built from {self._origin}."

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(), "id": tfds.features.Text(), **self.features()}
        return _Info(
            builder=self,
            description=self.description(),
            features=tfds.features.FeaturesDict(features),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in self.splits()}

    def rows(self, unit: units.Unit, threads: int) -> Iterator[tuple[units.Row, bytes]]:
        """Check the candidates of a unit, with `threads` threads that read and check images.

        Yields for each candidate in order its row (with "reason" if it is dropped) and the encoded
        image to store, b"" if it is dropped.
        """
        part = self.parts(unit.split)[unit.part]
        candidates = itertools.islice(part.read(), unit.start, unit.stop)
        check = functools.partial(_check, filters=self._filters)
        for candidate, outcome in _map_ahead(check, candidates, threads, lambda c: c.held):
            named = {"id": _shortened(candidate.id), "file": _shortened(candidate.file)}
            yield named | outcome.row, outcome.data

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        paths = units.finished(self._folder / units.FOLDER, split)
        report = self.report[split] = SplitReport(split, self._folder / DROPPED)
        rows = report.count(without_duplicates(paths, self._filters.dedup))
        # disable=None: no bar where there is no terminal
        for row, data in tqdm(rows, desc=split, unit="img", disable=None):
            if data:
                image = io.BytesIO(data)  # TFDS stores the bytes of a file object unchanged
                yield row["id"], {"image": image, "id": row["id"], **row["features"]}
        if not report.kept:
            raise UserError(f"split {split!r}: no usable image ({report.summary()}).")

    def _example_writer(self) -> writer.ExampleWriter:
        return _SortedWriter(file_format=self.info.file_format)

    def write_report(self, folder: Path) -> None:
        """Write report.json, report.html and dropped.jsonl to `folder`; see `SplitReport`."""
        splits = {split: report.to_json() for split, report in self.report.items()}
        text = json.dumps({"dataset": self.name, "splits": splits}, indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.html").write_text(page(self.name, self.report), encoding="utf-8")
        (self._folder / DROPPED).rename(folder / DROPPED)


class _SortedWriter(writer.ExampleWriter):
    """Writer of records with their features in a fixed order (`ordered`)."""

    def write(self, path: str, examples: Iterable[tuple[Any, bytes]]) -> Any:
        return super().write(path, ((key, ordered(record)) for key, record in examples))


def ordered(record: bytes) -> bytes:
    """Return a serialized Example with its features sorted, so that equal builds give equal bytes.

    TFDS leaves the order to protobuf's maps, which differs between processes.
    """
    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """Result of checking a candidate: its row, and the image to store (b"" if it is dropped)."""

    row: units.Row
    data: bytes = b""


def _check(candidate: Candidate, filters: Filters) -> _Outcome:
    problem = candidate.problem or filters.known_problem(legible(candidate.id), candidate.fields)
    if problem:
        return _Outcome({"reason": problem})
    features, replaced = _as_text(candidate.features)
    dropped = list(candidate.left_out)
    if len(features.get("question", "")) > MAX_CAPTION:
        return _Outcome({"reason": "question too long"})
    if features.get("captions"):
        features["captions"], more = kept_captions(filters, features["captions"])
        if not features["captions"]:
            return _Outcome({"reason": more[0]})
        dropped += more
    try:
        data = candidate.read()
        picture = filters.picture(data)
    except AmbiguousNameError as error:
        return _Outcome({"reason": "ambiguous name", "why": _shortened(str(error))})
    except FileNotFoundError:
        return _Outcome({"reason": "missing"})
    except RejectedError as error:
        return _Outcome({"reason": str(error)})
    except images.UnsupportedError as error:
        return _Outcome({"reason": "format not supported", "why": _shortened(str(error))})
    except (images.ImageError, *READ_ERRORS) as error:
        return _Outcome({"reason": "broken", "why": _shortened(str(error))})
    row = {"read": len(data), "features": features, "captions_dropped": dropped}
    row |= {"mended": replaced} if replaced else {}
    return _Outcome(row | picture.row, picture.data)


def _as_text(features: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Return features whose texts are legal Unicode, and the number of texts that were not."""
    own, replaced = dict(features), 0
    for name, value in features.items():
        texts = value if isinstance(value, list) else [value]
        wrong = [isinstance(text, str) and not is_text(text) for text in texts]
        if any(wrong):
            replaced += sum(wrong)
            texts = [mended(t) if bad else t for t, bad in zip(texts, wrong, strict=True)]
            own[name] = texts if isinstance(value, list) else texts[0]
    return own, replaced


def _shortened(text: str) -> str:
    text = legible(text)
    return text if len(text) <= MAX_ID else text[: MAX_ID - 1] + "…"


def _map_ahead(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    threads: int = _THREADS,
    held: Callable[[Any], int] = lambda _: 0,
) -> Iterator[tuple[Any, Any]]:
    """Yield (item, function(item)) in order.

    Threads compute at most `_AHEAD` results ahead, and only the next while those items hold more
    than MAX_HELD bytes, given by `held`.
    """
    with ThreadPoolExecutor(threads) as pool:
        running: collections.deque[tuple[Any, Future]] = collections.deque()
        total = 0
        try:
            for item in items:
                running.append((item, pool.submit(function, item)))
                total += held(item)
                while len(running) >= _AHEAD or total > MAX_HELD:
                    total -= held(running[0][0])
                    yield running[0][0], running.popleft()[1].result()
            while running:
                yield running[0][0], running.popleft()[1].result()
        finally:
            for _, future in running:
                future.cancel()
