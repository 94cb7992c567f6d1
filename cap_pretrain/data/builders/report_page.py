"""The report of a build as HTML (report.html): one self-contained file without scripts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg

from cap_pretrain.data import images
from cap_pretrain.data.builders.report import SplitReport
from cap_pretrain.pages.markup import Markup, document, element, image, markup, table

_SIDE = 128  # longer side of thumbnails, in pixels
_COUNTS = ("", "n", "n")  # classes of the columns of a table of counts


def page(dataset: str, splits: Mapping[str, SplitReport]) -> str:
    """Return the page of a dataset as HTML, given the report of each split."""
    title = f"Dataset {dataset}"
    body = [_split(name, report) for name, report in splits.items()]
    return document(title, element("h1", title), body)


def _split(name: str, report: SplitReport) -> Markup:
    rows = [("kept", report.kept), *report.dropped.items()]
    outcomes = [[what, *_count_and_percentage(n, report.candidates)] for what, n in rows]
    outcomes.append(["total", _number(report.candidates), ""])
    sizes = [
        ["images as read", _number(report.bytes_read), "bytes"],
        ["images as stored", _number(report.bytes_stored), "bytes"],
        ["resized", _number(report.resized), "images"],
        ["re-encoded without resizing", _number(report.reencoded), "images"],
    ]
    parts = [
        *(element("h2", name), element("h3", "Examples"), table(outcomes, _COUNTS)),
        *(element("h3", "Images of kept examples"), table(sizes, _COUNTS)),
    ]
    if report.captions:
        dropped = report.dropped_captions.items()
        counts = [["kept", _number(report.captions)]]
        counts += [[why, _number(n)] for why, n in dropped]
        parts += [element("h3", "Captions of kept examples"), table(counts, _COUNTS)]
        parts += [element("h3", "Length of captions"), _bars(report.histogram())]
    shown = [_sample(row, data) for row, data in report.shown()]
    return markup(parts, element("h3", "Samples of kept examples"), table(shown))


def _sample(row: Mapping[str, Any], data: bytes) -> Sequence[Any]:
    """Return the table cells of an example: its image and its features."""
    width, height = row["size"]
    features = dict(row["features"])
    lines = [element("p", caption) for caption in features.pop("captions", ())]
    lines += [element("p", f"{name}: {value}") for name, value in features.items()]
    size = f"{width} × {height}, {_number(row['bytes'])} bytes"
    about = element("small", row["id"], element("br"), size)
    shown = image(_thumbnail(data), "image/jpeg") if data else None
    return [shown, [lines, about]]


def _thumbnail(data: bytes) -> bytes:
    pixels = images.decode(data, _SIDE)
    scale = min(1.0, _SIDE / max(pixels.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=80, colorspace="RGB")


def _bars(counts: Mapping[str, int]) -> Markup:
    """Return a histogram of captions as a table with bars."""
    most = max(counts.values())
    rows: Iterable[Sequence[Any]] = (
        (words, _number(n), element("div", class_="bar", style=f"width: {100 * n / most:.1f}%"))
        for words, n in counts.items()
    )
    return table([("words", "captions", ""), *rows], ("n", "n", "wide"))


def _count_and_percentage(count: int, total: int) -> tuple[str, str]:
    return _number(count), f"{100 * count / total:.1f} %"


def _number(count: int) -> str:
    return f"{count:,}"
