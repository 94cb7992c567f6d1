"""Open a dataset by name, path or URL."""

import importlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cap_pretrain.data.sources import storage
from cap_pretrain.data.sources.base import INFO_FILE, Source
from cap_pretrain.data.sources.tfds import TfdsSource
from cap_pretrain.errors import UserError, did_you_mean

_GENERATED = {"scenes": "cap_pretrain.data.scenes.source:Scenes"}


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
    folder = find_dataset(name, data_dir)
    if isinstance(folder, storage.Remote):
        folder = storage.Copies(folder, cache)
    source = TfdsSource(folder, split, fields)
    source.check_files()
    return source


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
