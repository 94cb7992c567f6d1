"""What all formats share: checking images, counting losses, and the TFDS builder around it."""

import argparse
import collections
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from cap_pretrain.data import images
from cap_pretrain.data.builders.files import READ_ERRORS
from cap_pretrain.errors import UserError

_THREADS = os.cpu_count() or 1
_AHEAD = 4 * _THREADS  # candidates in memory at a time


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An example to be, if its image turns out to be usable.

    Attributes:
        id: unique within the split.
        file: name of the image, for the report.
        read: returns the encoded image; raises FileNotFoundError if there is none, or another of
            files.READ_ERRORS.
        features: everything but "image" and "id".
        problem: a reason to drop the example that is known without reading it, or "".
    """

    id: str
    file: str
    read: Callable[[], bytes]
    features: Mapping[str, Any]
    problem: str = ""


class SplitReport:
    """What became of the candidates of one split."""

    def __init__(self) -> None:
        self.candidates = 0
        self.kept = 0
        self.dropped: dict[str, list[dict[str, str]]] = {}  # by reason
        self.reencoded: list[str] = []  # files

    def drop(self, candidate: Candidate, reason: str, why: str = "") -> None:
        lost = {"id": candidate.id, "file": candidate.file, "why": why}
        self.dropped.setdefault(reason, []).append({k: v for k, v in lost.items() if v})

    def summary(self) -> str:
        """One line: "5990 of 6000 kept; dropped: 8 broken, 2 missing; 3 re-encoded"."""
        line = f"{self.kept} of {self.candidates} kept"
        if self.dropped:
            counts = (f"{len(lost)} {reason}" for reason, lost in self.dropped.items())
            line += f"; dropped: {', '.join(counts)}"
        return line + (f"; {len(self.reencoded)} re-encoded" if self.reencoded else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "candidates": self.candidates,
            "kept": self.kept,
            "dropped": {
                reason: {"count": len(lost), "examples": lost}
                for reason, lost in self.dropped.items()
            },
            "reencoded": {"count": len(self.reencoded), "files": self.reencoded},
        }


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

    def __init__(self, name: str, data_dir: Path):
        self.name = name
        self.report: dict[str, SplitReport] = {}
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
        """Returns the number of candidates of each split; None where only reading them tells."""
        raise NotImplementedError

    def candidates(self, split: str) -> Iterable[Candidate]:
        """Yields the candidates of a split, always in the same order."""
        raise NotImplementedError

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

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        total = self.splits()[split]
        report = self.report[split] = SplitReport()
        seen = set()
        pairs = _map_ahead(_check, self.candidates(split))
        # disable=None: no bar where there is no terminal
        for candidate, outcome in tqdm(pairs, desc=split, total=total, unit="img", disable=None):
            report.candidates += 1
            if isinstance(outcome, _Unusable):
                report.drop(candidate, outcome.reason, outcome.why)
                continue
            if candidate.id in seen:
                report.drop(candidate, "duplicate id")
                continue
            seen.add(candidate.id)
            report.kept += 1
            if outcome.reencoded:
                report.reencoded.append(candidate.file)
            image = io.BytesIO(outcome.data)  # bytes in a file object: TFDS stores them untouched
            yield candidate.id, {"image": image, "id": candidate.id, **candidate.features}
        if not report.kept:
            raise UserError(f"split {split!r}: no usable image ({report.summary()}).")

    def _example_writer(self) -> writer.ExampleWriter:
        return _SortedWriter(file_format=self.info.file_format)

    def write_report(self, folder: Path) -> None:
        """Writes report.json: per split what was kept, dropped (why, which) and re-encoded."""
        splits = {split: report.to_json() for split, report in self.report.items()}
        text = json.dumps({"dataset": self.name, "splits": splits}, indent=2, ensure_ascii=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")


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
class _Usable:
    data: bytes
    reencoded: bool


@dataclasses.dataclass(frozen=True)
class _Unusable:
    reason: str
    why: str = ""


def _check(candidate: Candidate) -> _Usable | _Unusable:
    if candidate.problem:
        return _Unusable(candidate.problem)
    try:
        data = candidate.read()
        plain = images.to_plain(data)
    except FileNotFoundError:
        return _Unusable("missing")
    except (images.ImageError, *READ_ERRORS) as error:
        return _Unusable("broken", str(error))
    return _Usable(plain, reencoded=plain is not data)


def _map_ahead(function: Callable, items: Iterable) -> Iterator[tuple[Any, Any]]:
    """Yields (item, function(item)) in order, computed by threads a bounded number ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
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
