"""Open a dataset by name, path or URL."""

import importlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cap_pretrain.data.sources import storage
from cap_pretrain.data.sources.base import INFO_FILE, Source
from cap_pretrain.data.sources.ranges import Cache, Ranges
from cap_pretrain.data.sources.tfds import TfdsSource
from cap_pretrain.errors import UserError, did_you_mean

GENERATED = {"scenes": "cap_pretrain.data.scenes.source:Scenes"}
"""Datasets that are generated on the fly: name -> "module:class".

The class is called as `cls(split, image_size=..., **options)`. Its options are the fields of the
dataclass `cls.Options`; a config holds them in the section `data.<name>`."""

FORMATS = {
    "wds": "cap_pretrain.data.sources.wds:WdsSource",
    "parquet": "cap_pretrain.data.sources.parquet:ParquetSource",
}
"""Files that are read in their original layout: the prefix of a name, as in "wds:PATTERN" -> class.

The class is called as `cls(pattern, split, fields=…, cache=…, budget=…)`."""


_ONCE = 4e9  # bytes of blocks that are kept for a single pass, which holds 32 blocks ahead


def open_source(
    name: str,
    split: str,
    *,
    image_size: int,
    data_dir: str = "",
    cache: str | Cache = "",
    fields: Mapping[str, str] | None = None,
    generated: Mapping[str, Mapping[str, Any]] | None = None,
) -> Source:
    """Open a dataset by name, path or URL.

    Args:
        name: a name in `GENERATED`; the path or URL ("gs://bucket/coco") of a dataset in TFDS
            format, which is the folder with dataset_info.json or a parent of it with only one
            version or config; or the name of a prepared TFDS dataset, such as "coco_captions/2014"
            or "coco_captions:1.1.0"; or files by a prefix in `FORMATS`, "wds:PATTERN".
        split: "train", "train[:90%]", "train+test", … in the syntax of TFDS. "val" and "validation"
            are aliases of each other when only one of them exists.
        image_size: side of generated images, in pixels. Stored images keep their own size.
        data_dir: folder in which TFDS datasets are looked up by name; empty: TFDS's default.
        cache: folder for local copies of remote files (see `storage`); or a `Cache`, so that blocks
            of their examples are fetched instead.
        fields: overrides of `DEFAULT_FIELDS`.
        generated: options of the datasets in `GENERATED`, by name, where they are not the defaults.

    Raises:
        UserError: there is no such dataset, split or field; the split is empty; the file format has
            no random access; or a file is missing or found to be corrupt when opened.
    """
    if name in GENERATED:
        return _imported(GENERATED[name])(
            split, image_size=image_size, **(generated or {}).get(name, {})
        )
    if found := in_original_layout(name):
        prefix, pattern = found
        kept = cache if isinstance(cache, Cache) else Cache(cache)
        return _imported(FORMATS[prefix])(
            pattern, split, fields=fields, cache=kept.folder, budget=kept.budget
        )
    folder = find_dataset(name, data_dir)
    if not isinstance(folder, storage.Remote):
        source = TfdsSource(folder, split, fields)
    elif isinstance(cache, Cache):
        copies = storage.Copies(folder, cache.folder)
        ranges = Ranges(folder, copies.files, cache.folder, cache.budget)
        source = TfdsSource(copies, split, fields, ranges, cache.block)
    else:
        source = TfdsSource(storage.Copies(folder, cache), split, fields)
    source.check_files()
    return source


def in_original_layout(name: str) -> tuple[str, str] | None:
    """Return prefix and pattern of a name with a prefix of `FORMATS`, None for other names."""
    prefix, colon, pattern = name.partition(":")
    return (prefix, pattern) if colon and prefix in FORMATS else None


def is_streamed(name: str, data_dir: str = "") -> bool:
    """Return whether a dataset is read from remote storage or from files in their original layout.

    The former are URLs, and names below a `data_dir` that is one.
    """
    if in_original_layout(name):
        return True
    path = storage.locate(name)
    if isinstance(path, storage.Remote):
        return True
    by_name = name not in GENERATED and not path.is_absolute() and not path.is_dir()
    return by_name and isinstance(storage.locate(data_dir), storage.Remote)


def cache_of(name: str, data_dir: str = "") -> Cache | str:
    """Return `cache` for reading a dataset once: what is streamed is read in blocks, not copied."""
    return Cache(budget=_ONCE) if is_streamed(name, data_dir) else ""


def _imported(path: str) -> Any:
    """Return the class "module:class"."""
    module, cls = path.split(":")
    return getattr(importlib.import_module(module), cls)


def find_dataset(name: str, data_dir: str = "") -> Path | storage.Remote:
    """Return the folder that holds the dataset_info.json of a dataset.

    A path or URL is used as it is. A name is looked up as `data_dir/name`, where
    "name/config:version" selects a config and a version, by default the newest version, as in TFDS.
    Raises UserError if there is no such dataset, or there are several configs to choose from.
    """
    path = storage.locate(name)
    if path.is_dir():
        return _version_folder(path)
    if path.is_absolute() or name.startswith(("~", ".")):
        raise UserError(f"dataset {name!r}: no such folder.{_similar(path.name, path.parent)}")
    if not data_dir:
        import tensorflow_datasets as tfds

        data_dir = tfds.core.constants.DATA_DIR
    root = storage.locate(data_dir)
    path = root / name.replace(":", "/")
    if path.is_dir():
        return _version_folder(path)
    raise UserError(
        f"dataset {name!r}: neither a folder nor a dataset prepared in {root}."
        f"{_similar(name, root, GENERATED)}\n"
        "Build one from your files with tools/build_dataset.py, or set data.dir."
    )


def _similar(name: str, parent: Path | storage.Remote, more: Iterable[str] = ()) -> str:
    """Return a "Did you mean" from the folders in `parent` and the names in `more`, or ""."""
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    return did_you_mean(name, [*names, *more])


def _version_folder(path: Path | storage.Remote) -> Path | storage.Remote:
    """Return `path` or the folder below it that holds the dataset_info.json."""
    if (path / INFO_FILE).is_file():
        return path
    versions = [p.parent for p in path.glob(f"*/{INFO_FILE}")]
    if versions:
        return max(versions, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
    configs = sorted({p.parent.parent for p in path.glob(f"*/*/{INFO_FILE}")}, key=str)
    if len(configs) == 1:
        return _version_folder(configs[0])
    if configs:
        names = ", ".join(p.name for p in configs)
        raise UserError(f"dataset {path}: holds several datasets or configs: {names}. Choose one.")
    raise UserError(
        f"dataset {path}: holds no {INFO_FILE}, so it is not a finished TFDS dataset.\n"
        "Turn images and captions into one with tools/build_dataset.py."
    )
