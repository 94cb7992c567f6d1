"""Examples for people to look at: evaluators make them, a run keeps the newest few for its report.

`WORKDIR/report/NAME.shown.json` has those of the newest evaluation by evaluator NAME:

    {"step": 300, "exhibits": [{"title": "val/7",
        "panels": [{"label": "", "right": null, "type": "image/png", "data": BASE64,
                    "width": 48, "height": 48}, …],
        "lines": [{"label": "caption", "text": "a red square", "right": true}, …]}, …]}
"""

import base64
import binascii
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from absl import logging

from cap_pretrain import files, untrusted
from cap_pretrain.data import images, views
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import checked, entry

FOLDER = "report"
"""Folder in a workdir."""

COUNT = 12
"""Examples of an evaluation at most."""

SIDE = 320
"""Longer side of a stored image at most, in pixels."""

LOSSLESS = 128
"""Longer side in pixels up to which images are stored as PNG: JPEG blurs small ones."""

BYTES = 400_000
"""Bytes of the images of one evaluation at most; further examples are left out."""

TYPES = ("image/png", "image/jpeg")


@dataclasses.dataclass(frozen=True)
class Panel:
    """An image, uint8 [H, W, 3], what it is, and whether that is right, None if not in question."""

    image: np.ndarray
    label: str = ""
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """A text, what it is, and whether it is right, None if not in question or not known."""

    label: str
    text: str
    right: bool | None = None


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """An example: its id or what it is about, images, and texts below them."""

    title: str
    panels: tuple[Panel, ...]
    lines: tuple[Line, ...] = ()


def original(image: bytes | np.ndarray) -> np.ndarray:
    """Return the image of an example at its own resolution and aspect, but not above SIDE.

    Raises ImageError if it does not decode, UserError if it holds features.
    """
    if views.is_features(image):
        raise UserError("the dataset holds features of an encoder, so there are no images to show")
    return _fitted(images.decode(image, SIDE) if isinstance(image, bytes) else np.asarray(image))


def path(workdir: Path, name: str) -> Path:
    """Return the file of the examples of evaluator `name`."""
    return workdir / FOLDER / f"{name}.shown.json"


def keep(workdir: Path, name: str, step: int, shown: Sequence[Exhibit]) -> None:
    """Write the examples of evaluator `name`; if that fails, warn, and the run goes on."""
    try:
        write(path(workdir, name), step, shown)
    except Exception as error:  # of whatever kind
        logging.warning("%s was not written: %s", path(workdir, name), error)


def write(where: Path, step: int, shown: Sequence[Exhibit]) -> None:
    """Write examples to the file `where`, atomically."""
    entries, size = [], 0
    for exhibit in shown[:COUNT]:
        panels = [_encoded(panel) for panel in exhibit.panels]
        size += sum(len(panel["data"]) for panel in panels)
        if size > BYTES * 4 / 3:  # base64 takes four letters for three bytes
            break
        lines = [dataclasses.asdict(line) for line in exhibit.lines]
        entries.append({"title": exhibit.title, "panels": panels, "lines": lines})
    files.write_text(where, json.dumps({"step": step, "exhibits": entries}) + "\n")


def _fitted(pixels: np.ndarray) -> np.ndarray:
    scale = min(1.0, SIDE / max(pixels.shape[:2]))
    if scale == 1:
        return pixels
    height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)


def _encoded(panel: Panel) -> dict[str, Any]:
    pixels = np.ascontiguousarray(_fitted(panel.image))
    if max(pixels.shape[:2]) <= LOSSLESS:
        data = cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()
    else:
        data = simplejpeg.encode_jpeg(pixels, quality=85, colorspace="RGB")
    height, width = pixels.shape[:2]
    return {
        **{"label": panel.label, "right": panel.right, "width": width, "height": height},
        "type": TYPES[max(height, width) > LOSSLESS],
        "data": base64.b64encode(data).decode(),
    }


def read(where: Path) -> dict[str, Any]:
    """Read what `write` wrote, with the `data` of images as bytes; raise UserError if malformed."""
    found = checked(files.read_json(where), "content", dict, where)
    shown = []
    for exhibit in entry(found, "exhibits", list, where)[:COUNT]:
        panels = [_decoded(panel, where) for panel in entry(exhibit, "panels", list, where)]
        lines = [
            {name: entry(line, name, str, where) for name in ("label", "text")} | _right(line)
            for line in entry(exhibit, "lines", list, where)
        ]
        shown.append(
            {"title": entry(exhibit, "title", str, where), "panels": panels, "lines": lines}
        )
    return {"step": entry(found, "step", int, where), "exhibits": shown}


def _decoded(panel: Any, where: Path) -> dict[str, Any]:
    found = {name: entry(panel, name, str, where) for name in ("label", "type", "data")}
    if found["type"] not in TYPES:
        raise UserError(f"{where}: type: {untrusted.shown(found['type'])} is not an image's.")
    try:
        data = base64.b64decode(found["data"], validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"{where}: data: {error}; delete the file.") from error
    sides = {
        name: untrusted.bounded(entry(panel, name, int, where), name, 1, SIDE, where)
        for name in ("width", "height")
    }
    return found | sides | {"data": data} | _right(panel)


def _right(values: Any) -> dict[str, bool | None]:
    right = values.get("right")
    return {"right": right if isinstance(right, bool) else None}
