"""The report of a build as HTML (report.html): one self-contained file without scripts."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg

from cap_pretrain.data import images
from cap_pretrain.data.builders.report import SplitReport

_SIDE = 128  # longer side of thumbnails, in pixels
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 60em; margin: 2em auto; }
table { border-collapse: collapse; margin: .6em 0 1.4em; }
td, th { padding: .25em .9em .25em 0; text-align: left; vertical-align: top; }
tr + tr { border-top: 1px solid #ddd; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar { background: #4878a8; height: .8em; margin-top: .35em; }
.wide { width: 20em; }
p { margin: 0 0 .3em; }
small { color: #666; }
"""


def page(dataset: str, splits: Mapping[str, SplitReport]) -> str:
    """Return the page of a dataset as HTML, given the report of each split."""
    title = f"Dataset {html.escape(dataset)}"
    body = "".join(_split(name, report) for name, report in splits.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n{body}</body>\n</html>\n"
    )


def _split(name: str, report: SplitReport) -> str:
    rows = [("kept", report.kept), *report.dropped.items()]
    outcomes = [[_text(what), *_count_and_percentage(n, report.candidates)] for what, n in rows]
    outcomes.append(["total", _number(report.candidates), ""])
    sizes = [
        ["images as read", _number(report.bytes_read), "bytes"],
        ["images as stored", _number(report.bytes_stored), "bytes"],
        ["resized", _number(report.resized), "images"],
        ["re-encoded without resizing", _number(report.reencoded), "images"],
    ]
    parts = [
        f"<h2>{_text(name)}</h2>\n<h3>Examples</h3>\n{_table(outcomes)}",
        f"<h3>Images of kept examples</h3>\n{_table(sizes)}",
    ]
    if report.captions:
        dropped = report.dropped_captions.items()
        counts = [["kept", _number(report.captions)]]
        counts += [[_text(why), _number(n)] for why, n in dropped]
        parts.append(f"<h3>Captions of kept examples</h3>\n{_table(counts)}")
        parts.append(f"<h3>Length of captions</h3>\n{_bars(report.histogram())}")
    shown = [_sample(row, data) for row, data in report.shown()]
    parts.append(f"<h3>Samples of kept examples</h3>\n{_table(shown, ('', ''))}")
    return "".join(parts)


def _sample(row: Mapping[str, Any], data: bytes) -> list[str]:
    """Return the table cells of an example: its image and its features."""
    width, height = row["size"]
    features = dict(row["features"])
    lines = [f"<p>{_text(caption)}</p>" for caption in features.pop("captions", ())]
    lines += [f"<p>{_text(name)}: {_text(value)}</p>" for name, value in features.items()]
    about = f"{_text(row['id'])}<br>{width} &times; {height}, {_number(row['bytes'])} bytes"
    thumbnail = base64.b64encode(_thumbnail(data)).decode() if data else ""
    image = f'<img alt="" src="data:image/jpeg;base64,{thumbnail}">' if data else ""
    return [image, f"{''.join(lines)}<small>{about}</small>"]


def _thumbnail(data: bytes) -> bytes:
    pixels = images.decode(data, _SIDE)
    scale = min(1.0, _SIDE / max(pixels.shape[:2]))
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=80, colorspace="RGB")


def _bars(counts: Mapping[str, int]) -> str:
    """Return a histogram of captions as a table with bars."""
    most = max(counts.values())
    bars = (
        f'<div class="bar" style="width: {100 * n / most:.1f}%"></div>' for n in counts.values()
    )
    rows = zip(counts, map(_number, counts.values()), bars, strict=True)
    return _table([("words", "captions", ""), *rows], ("n", "n", "wide"))


def _table(rows: Iterable[Iterable[str]], classes: Sequence[str] = ("", "n", "n")) -> str:
    """Return a table of cells given as HTML, with a CSS class for each column."""
    lines = []
    for row in rows:
        cells = [f'<td class="{c}">{cell}</td>' for cell, c in zip(row, classes, strict=False)]
        lines.append(f"<tr>{''.join(cells)}</tr>\n")
    return f"<table>\n{''.join(lines)}</table>\n"


def _count_and_percentage(count: int, total: int) -> tuple[str, str]:
    return _number(count), f"{100 * count / total:.1f} %"


def _number(count: int) -> str:
    return f"{count:,}"


def _text(value: Any) -> str:
    return html.escape(str(value))
