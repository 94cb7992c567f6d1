"""What all formats share: checking images, counting losses, and the TFDS builder around it."""

import argparse
import collections
import dataclasses
import functools
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from cap_pretrain.data import images
from cap_pretrain.data.builders import units
from cap_pretrain.data.builders.candidates import Candidate
from cap_pretrain.data.builders.duplicates import without_duplicates
from cap_pretrain.data.builders.files import READ_ERRORS
from cap_pretrain.data.builders.filters import Filters, Refused, kept_captions
from cap_pretrain.data.builders.report import DROPPED, SplitReport
from cap_pretrain.data.builders.report_page import page
from cap_pretrain.errors import UserError

_THREADS = os.cpu_count() or 1
_AHEAD = 4 * _THREADS  # candidates in memory at a time


class ImageDataset(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of all formats: a subclass says what the candidates are, this one checks and keeps them.

    Images are stored as they are if every decoder reads them alike, else encoded again
    (images.to_plain). What cannot be used is counted in `report`, and ends nothing.
    """

    VERSION = tfds.core.Version("1.0.0")
    HOMEPAGE = ""
    CITATION = ""
    # Where TFDS looks for checksums of downloads, of which there are none; its own search would
    # need importlib_resources, which it does not declare.
    code_path = None

    def __init__(self, name: str, data_dir: Path, filters: Filters | None = None):
        """`data_dir` is the folder that `build` works in.

        Raises:
            UserError: filters for captions, of a format without.
        """
        self.name = name
        self.report: dict[str, SplitReport] = {}
        self._folder, self._filters = Path(data_dir), filters or Filters()
        features = self.features()
        if self._filters.on_captions and ("captions" not in features or "question" in features):
            raise UserError("--min_words and its like are for captions, which this format lacks.")
        super().__init__(data_dir=data_dir)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declares the command line arguments of this format."""
        raise NotImplementedError

    @classmethod
    def from_arguments(cls, args: argparse.Namespace, name: str, data_dir: Path) -> "ImageDataset":
        """Returns the builder. Raises UserError for files that are missing or not understood."""
        raise NotImplementedError

    def splits(self) -> Mapping[str, int | None]:
        """Returns the number of candidates of each split; None where `parts` know it."""
        raise NotImplementedError

    def candidates(self, split: str) -> Iterable[Candidate]:
        """Yields the candidates of a split, always in the same order, if `parts` ask for it."""
        raise NotImplementedError

    def parts(self, split: str) -> Sequence[units.Part]:
        """Returns what the candidates of a split are read from, always in the same order."""
        candidates = functools.partial(self.candidates, split)
        return [units.Part(candidates, count=lambda: self.splits()[split])]

    def features(self) -> dict[str, Any]:
        """Returns the TFDS features besides "image" and "id"."""
        raise NotImplementedError

    def description(self) -> str:
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"image": tfds.features.Image(), "id": tfds.features.Text(), **self.features()}
        return tfds.core.DatasetInfo(
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
        """Yields what becomes of each candidate of a unit, and the images that are kept."""
        part = self.parts(unit.split)[unit.part]
        candidates = itertools.islice(part.read(), unit.start, unit.stop)
        check = functools.partial(_check, filters=self._filters)
        for candidate, outcome in _map_ahead(check, candidates, threads):
            yield {"id": candidate.id, "file": candidate.file, **outcome.row}, outcome.data

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        paths = units.finished(self._folder / units.FOLDER, split)
        report = self.report[split] = SplitReport(split, self._folder / DROPPED)
        rows = report.count(without_duplicates(paths, self._filters.dedup))
        # disable=None: no bar where there is no terminal
        for row, data in tqdm(rows, desc=split, unit="img", disable=None):
            if data:
                image = io.BytesIO(data)  # bytes in a file object: TFDS stores them untouched
                yield row["id"], {"image": image, "id": row["id"], **row["features"]}
        if not report.kept:
            raise UserError(f"split {split!r}: no usable image ({report.summary()}).")

    def _example_writer(self) -> writer.ExampleWriter:
        return _SortedWriter(file_format=self.info.file_format)

    def write_report(self, folder: Path) -> None:
        """Writes report.json, report.html and dropped.jsonl. See `SplitReport`."""
        splits = {split: report.to_json() for split, report in self.report.items()}
        text = json.dumps({"dataset": self.name, "splits": splits}, indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
        (folder / "report.html").write_text(page(self.name, self.report), encoding="utf-8")
        (self._folder / DROPPED).rename(folder / DROPPED)


class _SortedWriter(writer.ExampleWriter):
    """Writes records that are `ordered`."""

    def write(self, path: str, examples: Iterable[tuple[Any, bytes]]) -> Any:
        return super().write(path, ((key, ordered(record)) for key, record in examples))


def ordered(record: bytes) -> bytes:
    """A record with its features in a fixed order, so that equal builds give equal bytes.

    TFDS leaves the order to protobuf's maps, which differs from process to process.
    """
    return tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What a unit says of a candidate; `data` is the image if it is kept, or b""."""

    row: units.Row
    data: bytes = b""


def _check(candidate: Candidate, filters: Filters) -> _Outcome:
    problem = candidate.problem or filters.known_problem(candidate.id, candidate.fields)
    if problem:
        return _Outcome({"reason": problem})
    features, lost = dict(candidate.features), []
    if filters.on_captions:
        features["captions"], lost = kept_captions(filters, features["captions"])
        if not features["captions"]:
            return _Outcome({"reason": lost[0]})
    try:
        data = candidate.read()
        picture = filters.picture(data)
    except FileNotFoundError:
        return _Outcome({"reason": "missing"})
    except Refused as error:
        return _Outcome({"reason": str(error)})
    except (images.ImageError, *READ_ERRORS) as error:
        return _Outcome({"reason": "broken", "why": str(error)})
    row = {"read": len(data), "features": features, "captions_dropped": lost}
    return _Outcome(row | picture.row, picture.data)


def _map_ahead(
    function: Callable, items: Iterable, threads: int = _THREADS
) -> Iterator[tuple[Any, Any]]:
    """Yields (item, function(item)) in order, computed by threads a bounded number ahead."""
    with ThreadPoolExecutor(threads) as pool:
        running = collections.deque()
        try:
            for item in items:
                running.append((item, pool.submit(function, item)))
                if len(running) >= _AHEAD:
                    item, future = running.popleft()
                    yield item, future.result()
            while running:
                item, future = running.popleft()
                yield item, future.result()
        finally:
            for _, future in running:
                future.cancel()
