"""Where examples come from: random-access sequences of captioned (or labelled) images.

A source is a picklable sequence. `source[i]` is one example, as it is stored:

    {"image": bytes (an encoded file) | uint8 [H, W, 3] | float [1 + N, D] (features, see
     tools/extract_features.py), "captions": list[str] (may be empty),
     "label": int (-1: none), "id": str, "question": str,
     "weights": list[float] (how often each caption is drawn; missing or empty: all alike)}

and `source.class_names` lists the names of the labels (empty: none). A question (missing or "":
none) is what the captions answer; then label and class names are those of kinds of questions. A new
kind of source is one new file with such a class and one entry in `_GENERATED`; everything stored
goes through TFDS. It may have `without_image(i)`, the rest of an example where that takes less.
"""

import contextlib
import importlib
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from cap_pretrain.data import storage
from cap_pretrain.errors import UserError, did_you_mean

Example = dict[str, Any]

DEFAULT_FIELDS = {name: name for name in ("image", "captions", "label", "id", "question")}
"""Which feature of a stored dataset holds what; "a/b" is feature b inside of feature a.

Captions may be in several, "caption:2+alt_text": one of these features is drawn by its weight, 1
when left out, and then one of its captions. What is empty there is no caption."""

_GENERATED = {"scenes": "cap_pretrain.data.scenes:Scenes"}
INFO_FILE = "dataset_info.json"


class Source(Protocol):
    """What the pipeline needs to know of a dataset."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def without_image(source: Source, index: int) -> Example:
    """An example for whom its image does not matter: it may be missing."""
    return getattr(source, "without_image", source.__getitem__)(index)


def open_source(
    name: str,
    split: str,
    *,
    image_size: int,
    data_dir: str = "",
    cache: str = "",
    fields: Mapping[str, str] | None = None,
    scenes: Mapping[str, Any] | None = None,
) -> Source:
    """Opens a dataset by name or path.

    Args:
        name: "scenes"; or a path to a dataset in TFDS format (the folder with dataset_info.json, or
            a parent of it with one version or config), which may be a URL like "gs://bucket/coco";
            or the name of a prepared TFDS dataset, like "coco_captions/2014" or
            "coco_captions:1.1.0".
        split: "train", "train[:90%]", "train+test", … in the syntax of TFDS. "val" and "validation"
            stand for each other when only one of them exists.
        image_size: side of generated images, pixels; stored images keep their own size.
        data_dir: where TFDS datasets are looked for by name; empty: TFDS's own default.
        cache: where copies of remote files are kept (see `storage`).
        fields: overrides of DEFAULT_FIELDS.
        scenes: options of the generated dataset.

    Raises:
        UserError: no such dataset, split or field; an empty split; not stored in a format that
            allows random access; a file that is missing or damaged, as far as opening it tells.
    """
    if name in _GENERATED:
        module, cls = _GENERATED[name].split(":")
        generate = getattr(importlib.import_module(module), cls)
        return generate(split, image_size=image_size, **(scenes or {}))
    from cap_pretrain.data.tfds_source import TfdsSource  # which needs this module

    folder = find_dataset(name, data_dir)
    if isinstance(folder, storage.Remote):
        folder = storage.Copies(folder, cache)
    source = TfdsSource(folder, split, fields)
    source.check_files()
    return source


def parse_mixture(text: str, field: str = "data.name") -> list[tuple[str, float]]:
    """Splits "a:0.2+b:0.8" into [("a", 0.2), ("b", 0.8)]; a weight that is left out is 1.

    What follows the last colon is a weight only if it is a number, so paths and versions
    ("coco_captions:1.1.0") may contain colons. Paths may not contain "+".

    Raises:
        UserError: an empty name, or a weight that is not positive and finite. It names `field`.
    """
    return [_parse_weighted(part.strip(), f"{field} {text!r}") for part in text.split("+")]


def _parse_weighted(part: str, where: str) -> tuple[str, float]:
    name, weight = part, 1.0
    before, colon, after = part.rpartition(":")
    if colon:
        with contextlib.suppress(ValueError):  # not a number: the colon belongs to the name
            name, weight = before.strip(), float(after)
    if not name:
        raise UserError(f"{where}: a name is empty; write name:weight+name:weight.")
    if not (weight > 0 and math.isfinite(weight)):
        raise UserError(f"{where}: the weight of {name!r} is {weight}; it must be > 0.")
    return name, weight


def find_dataset(name: str, data_dir: str = "") -> Path | storage.Remote:
    """Returns the folder that holds the dataset_info.json of a dataset by path, URL or name.

    A name is looked up as `data_dir/name`, with "name/config:version" for a config and version.
    Of several versions the newest is taken, as TFDS does.

    Raises:
        UserError: there is none, or there are several configs to choose from.
    """
    path = storage.locate(name)
    if path.is_dir():
        return _version_folder(path)
    if path.is_absolute() or name.startswith(("~", ".")):
        raise UserError(f"dataset {name!r}: no such folder.{_near(path.name, path.parent)}")
    if not data_dir:
        import tensorflow_datasets as tfds

        data_dir = tfds.core.constants.DATA_DIR
    root = storage.locate(data_dir)
    path = root / name.replace(":", "/")
    if path.is_dir():
        return _version_folder(path)
    raise UserError(
        f"dataset {name!r}: no folder, and not prepared in {root}.{_near(name, root, _GENERATED)}\n"
        "Build one from your files with tools/build_dataset.py, or set data.dir."
    )


def _near(name: str, parent: Path | storage.Remote, more: Iterable[str] = ()) -> str:
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    return did_you_mean(name, [*names, *more])


def _version_folder(path: Path | storage.Remote) -> Path | storage.Remote:
    if (path / INFO_FILE).is_file():
        return path
    versions = [p.parent for p in path.glob(f"*/{INFO_FILE}")]
    if versions:
        return max(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    configs = sorted({p.parent.parent for p in path.glob(f"*/*/{INFO_FILE}")})
    if len(configs) == 1:
        return _version_folder(configs[0])
    if configs:
        names = ", ".join(p.name for p in configs)
        raise UserError(f"dataset {path}: holds several datasets or configs: {names}. Choose one.")
    raise UserError(
        f"dataset {path}: holds no {INFO_FILE}, so it is not a finished TFDS dataset.\n"
        "Turn images and captions into one with tools/build_dataset.py."
    )
