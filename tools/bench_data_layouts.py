"""Write the examples of tools/bench_data.py in other layouts, and train on these as they are."""

import io
import tarfile
from pathlib import Path

import grain
from ml_collections import ConfigDict

from cap_pretrain import inputs
from cap_pretrain.data.sources.base import DEFAULT_FIELDS, Source
from cap_pretrain.data.text.tokenizers import Tokenizer
from cap_pretrain.training import feed

LAYOUTS = ("wds", "parquet")
"""Prefixes of `data.name`; each names a folder with the files of that layout, too."""

EXAMPLES, PER_FILE, PER_GROUP = 20_000, 1000, 100
"""Most examples that are written, of a file, and of a row group: the Hub's row groups of images."""


def write(source: Source, folder: Path) -> None:
    """Write examples as tars like those of img2dataset, and as Parquet like that of the Hub."""
    import pyarrow as pa
    from pyarrow import parquet

    for layout in LAYOUTS:
        (folder / layout).mkdir()
    count = min(len(source), EXAMPLES)
    for number, start in enumerate(range(0, count, PER_FILE)):
        examples = [source[i] for i in range(start, min(start + PER_FILE, count))]
        with tarfile.open(folder / "wds" / f"{number:05}.tar", "w") as tar:
            for place, example in enumerate(examples):
                caption = "".join(example["captions"][:1]).encode()
                for suffix, data in (("jpg", example["image"]), ("txt", caption)):
                    info = tarfile.TarInfo(f"{number:05}{place:04}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        rows = {
            "image": [{"bytes": e["image"], "path": None} for e in examples],
            "text": [e["captions"][:1] for e in examples],
        }
        path = folder / "parquet" / f"train-{number:05}.parquet"
        parquet.write_table(pa.table(rows), path, row_group_size=PER_GROUP)


def opened(config: ConfigDict, layout: str, folder: Path, tokenizer: Tokenizer) -> grain.MapDataset:
    """Return the batches of a config from the files of a layout, in the order of blocks."""
    config = config.copy_and_resolve_references()
    config.data.name, config.data.split = f"{layout}:{folder / layout}", "train"
    config.data.order, config.data.lanes, config.data.held_out = "auto", 0, 0
    config.data.cache = str(folder / "cache")
    config.data.fields.update(DEFAULT_FIELDS)
    mixture = inputs.open_sources(config)
    config = inputs.completed(config, mixture)
    return feed.training_batches(config, feed.in_buckets(config, mixture, tokenizer), tokenizer)
