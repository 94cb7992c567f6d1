"""What became of the candidates of a build: report.json, report.html and dropped.jsonl."""

import collections
import heapq
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cap_pretrain.data.builders import hashes
from cap_pretrain.data.builders.units import Row

DROPPED = "dropped.jsonl"

LISTED = 100
"""Examples named in report.json for each reason; dropped.jsonl names all."""

SHOWN = 10
"""Examples that are kept, shown in report.html."""

_LONGEST = 50  # words; longer captions are counted together


class SplitReport:
    """What became of the candidates of one split; its size does not grow with theirs."""

    def __init__(self, split: str, dropped: Path) -> None:
        """Those that are dropped are appended to the file `dropped`, a line of JSON each."""
        self.candidates = 0
        self.kept = 0
        self.bytes_read = 0  # of the images that are kept
        self.bytes_stored = 0
        self.reencoded = 0
        self.resized = 0
        self.captions = 0
        self.dropped: collections.Counter[str] = collections.Counter()  # by reason
        self.dropped_captions: collections.Counter[str] = collections.Counter()
        self.words: collections.Counter[int] = collections.Counter()  # captions by their number
        self._split = split
        self._path = dropped
        self._listed: dict[str, list[dict[str, str]]] = collections.defaultdict(list)
        self._reencoded: list[str] = []
        self._shown: list[tuple[int, str, Row, bytes]] = []

    def count(self, rows: Iterable[tuple[Row, bytes]]) -> Iterator[tuple[Row, bytes]]:
        """Passes on rows with their images, and counts them."""
        with self._path.open("a", encoding="utf-8") as file:
            for row, data in rows:
                self.candidates += 1
                if "reason" in row:
                    self._drop(row)
                    lost = {"split": self._split, "reason": row["reason"], **_named(row)}
                    file.write(json.dumps(lost, ensure_ascii=False) + "\n")
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
        if row["reencoded"] and not row["resized"]:
            self.reencoded += 1
            if len(self._reencoded) < LISTED:
                self._reencoded.append(row["file"])
        captions = row["features"].get("captions", ())
        self.captions += len(captions)
        self.words.update(min(len(caption.split()), _LONGEST) for caption in captions)
        self.dropped_captions.update(row["captions_dropped"])
        # Those whose hash is highest: any, but always the same.
        ranked = hashes.exact(row["id"].encode()), row["id"], row, data
        if len(self._shown) < SHOWN:
            heapq.heappush(self._shown, ranked)
        else:
            heapq.heappushpop(self._shown, ranked)

    def shown(self) -> list[tuple[Row, bytes]]:
        """Some examples that were kept, with their images."""
        return [(row, data) for _, _, row, data in sorted(self._shown, key=lambda s: s[:2])]

    def summary(self) -> str:
        """One line: "5990 of 6000 kept; dropped: 8 broken, 2 missing; 3 re-encoded"."""
        line = f"{self.kept} of {self.candidates} kept"
        if self.dropped:
            counts = (f"{count} {reason}" for reason, count in self.dropped.items())
            line += f"; dropped: {', '.join(counts)}"
        line += f"; {self.reencoded} re-encoded" if self.reencoded else ""
        return line + (f"; {self.resized} resized" if self.resized else "")

    def histogram(self) -> dict[str, int]:
        """How many captions have how many words, from the shortest to the longest."""
        if not self.words:
            return {}
        lengths = range(min(self.words), max(self.words) + 1)
        return {f"{n}+" if n == _LONGEST else str(n): self.words[n] for n in lengths}

    def to_json(self) -> dict[str, Any]:
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
            "caption_words": self.histogram(),
            "samples": [
                {"id": row["id"], "file": row["file"], "size": row["size"], **row["features"]}
                for row, _ in self.shown()
            ],
        }


def _named(row: Row) -> dict[str, str]:
    return {key: row[key] for key in ("id", "file", "why") if row.get(key)}
