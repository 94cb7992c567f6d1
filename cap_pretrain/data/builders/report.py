"""Report of a build: what was kept and dropped (report.json, report.html and dropped.jsonl)."""

import collections
import heapq
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cap_pretrain.data.builders import hashes
from cap_pretrain.data.builders.units import Row

DROPPED = "dropped.jsonl"

LISTED = 100  # examples named in report.json for each reason; dropped.jsonl names all
SHOWN = 10  # kept examples in report.html
SHOWN_BYTES = 2**24  # of the largest image that is shown, since they are in memory
SHOWN_CAPTIONS = 20  # of an example that is shown
_LONGEST = 50  # words; longer captions share a bin of the histogram


class SplitReport:
    """Counts and samples of one split, in memory that does not grow with the split.

    All counts but `candidates` and `dropped` are about kept examples. For each dropped candidate, a
    line of JSON is appended to the file `dropped`.
    """

    def __init__(self, split: str, dropped: Path) -> None:
        self.candidates = 0
        self.kept = 0
        self.bytes_read = 0  # size of the images as they were read
        self.bytes_stored = 0
        self.reencoded = 0  # images that were re-encoded without being resized
        self.resized = 0
        self.mended = 0  # texts that were not valid Unicode
        self.captions = 0  # that are kept
        self.dropped: collections.Counter[str] = collections.Counter()  # by reason
        self.dropped_captions: collections.Counter[str] = collections.Counter()  # by reason
        self.words: collections.Counter[int] = collections.Counter()  # captions by number of words
        self._split = split
        self._path = dropped
        self._listed: dict[str, list[dict[str, str]]] = collections.defaultdict(list)
        self._reencoded: list[str] = []
        self._shown: list[tuple[int, str, Row, bytes]] = []

    def count(self, rows: Iterable[tuple[Row, bytes]]) -> Iterator[tuple[Row, bytes]]:
        """Count rows and yield them with their images unchanged."""
        with self._path.open("a", encoding="utf-8") as file:
            for row, data in rows:
                self.candidates += 1
                if "reason" in row:
                    self._drop(row)
                    line = {"split": self._split, "reason": row["reason"], **_named(row)}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                else:
                    self._keep(row, data)
                yield row, data

    def _drop(self, row: Row) -> None:
        self.dropped[row["reason"]] += 1
        if len(listed := self._listed[row["reason"]]) < LISTED:
            listed.append(_named(row))

    def _keep(self, row: Row, data: bytes) -> None:
        self.kept += 1
        self.bytes_read += row["read"]
        self.bytes_stored += len(data)
        self.resized += row["resized"]
        self.mended += row.get("mended", 0)
        if row["reencoded"] and not row["resized"]:
            self.reencoded += 1
            if len(self._reencoded) < LISTED:
                self._reencoded.append(row["file"])
        captions = row["features"].get("captions", ())
        self.captions += len(captions)
        self.words.update(min(len(caption.split()), _LONGEST) for caption in captions)
        self.dropped_captions.update(row["captions_dropped"])
        # Sample the examples with the highest hashes: pseudorandom, but the same in every build.
        features = row["features"] | ({"captions": captions[:SHOWN_CAPTIONS]} if captions else {})
        row = {**row, "features": features}
        data = data if len(data) <= SHOWN_BYTES else b""
        ranked = hashes.exact(row["id"].encode()), row["id"], row, data
        if len(self._shown) < SHOWN:
            heapq.heappush(self._shown, ranked)
        else:
            heapq.heappushpop(self._shown, ranked)

    def shown(self) -> list[tuple[Row, bytes]]:
        """Return a sample of the kept examples, with their images, b"" for large ones."""
        return [(row, data) for _, _, row, data in sorted(self._shown, key=lambda s: s[:2])]

    def summary(self) -> str:
        """Return a line like "5990 of 6000 kept; dropped: 8 broken, 2 missing; 3 re-encoded"."""
        line = f"{self.kept} of {self.candidates} kept"
        if self.dropped:
            counts = (f"{count} {reason}" for reason, count in self.dropped.items())
            line += f"; dropped: {', '.join(counts)}"
        line += f"; {self.reencoded} re-encoded" if self.reencoded else ""
        line += f"; {self.mended} texts not in Unicode, mended" if self.mended else ""
        return line + (f"; {self.resized} resized" if self.resized else "")

    def histogram(self) -> dict[str, int]:
        """Return the number of captions by length in words, from the shortest to the longest."""
        if not self.words:
            return {}
        lengths = range(min(self.words), max(self.words) + 1)
        return {f"{n}+" if n == _LONGEST else str(n): self.words[n] for n in lengths}

    def to_json(self) -> dict[str, Any]:
        """Return the split's part of report.json."""
        return {
            "candidates": self.candidates,
            "kept": self.kept,
            "dropped": {
                reason: {"count": count, "examples": self._listed[reason]}
                for reason, count in self.dropped.items()
            },
            "reencoded": {"count": self.reencoded, "files": self._reencoded},
            "resized": self.resized,
            "bytes": {"read": self.bytes_read, "stored": self.bytes_stored},
            "captions": {"kept": self.captions, "dropped": dict(self.dropped_captions)},
            **({"texts_mended": self.mended} if self.mended else {}),
            "caption_words": self.histogram(),
            "samples": [
                {"id": row["id"], "file": row["file"], "size": row["size"], **row["features"]}
                for row, _ in self.shown()
            ],
        }


def _named(row: Row) -> dict[str, str]:
    return {key: row[key] for key in ("id", "file", "why") if row.get(key)}
