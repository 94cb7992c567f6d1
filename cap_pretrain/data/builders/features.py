"""Writes datasets of precomputed features, in place of images, in TFDS format.

TFDS's own writer holds a split in memory to shuffle it, and needs TensorFlow beyond a gigabyte.
This one writes examples as they come, so that training sees the same order as on images.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from cap_pretrain.data.builders.base import ordered
from cap_pretrain.data.builders.regions import region_features, stored_regions
from cap_pretrain.data.sources.base import Example

_WRITING = "group_size:1,uncompressed"  # random access; features hardly compress
_SHARD_BYTES = 256 * 2**20  # small enough for threads to read different files


@dataclasses.dataclass
class Split:
    """Progress of writing a split."""

    shards: list[int] = dataclasses.field(default_factory=list)  # number of examples by file
    bytes: int = 0  # size of all records


class FeatureDataset:
    """Writer of a dataset of features to `folder` (NAME/VERSION), which must not exist.

    Label, question and regions are stored if `like`, an example of the source, has them. Features
    have the `dtype` float32 or float16 and the `shape` (1 + N, D): the pooled vector and N tokens.
    Without `class_names`, labels are plain integers. `splits` is what has been written so far, by
    name.
    """

    def __init__(
        self,
        folder: Path,
        *,
        like: Example,
        shape: tuple[int, int],
        dtype: Any,
        class_names: Sequence[str] = (),
    ):
        folder.mkdir(parents=True)
        self._folder, self._name = folder, folder.parent.name
        feature = {
            "image": tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding="bytes"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "id": tfds.features.Text(),
        }
        if class_names:
            feature["label"] = tfds.features.ClassLabel(names=list(class_names))
        elif like["label"] >= 0:
            feature["label"] = tfds.features.Scalar(np.int64)
        if like.get("question"):
            feature["question"] = tfds.features.Text()
        if "regions" in like:
            feature |= region_features()
        self._features = tfds.features.FeaturesDict(feature)
        self._serializer = tfds.core.example_serializer.ExampleSerializer(
            self._features.get_serialized_info()
        )
        self.splits: dict[str, Split] = {}

    def write_split(self, name: str, examples: Iterator[Example]) -> Split:
        """Write the examples of a split in order; their "image" holds the features."""
        split = self.splits[name] = Split()
        writer, size = None, 0
        for example in examples:
            values = {name: example[name] for name in self._features if name in example}
            if "boxes" in self._features:
                values |= stored_regions(example["regions"])
            record = self._serializer.serialize_example(self._features.encode_example(values))
            record = ordered(record)
            if writer is None or size + len(record) > _SHARD_BYTES:
                if writer:
                    writer.close()
                path = self._folder / f"{len(split.shards)}.tmp"
                writer, size = ArrayRecordWriter(str(path), _WRITING), 0
                split.shards.append(0)
            writer.write(record)
            size += len(record)
            split.bytes += len(record)
            split.shards[-1] += 1
        if writer:
            writer.close()
        for k in range(len(split.shards)):
            shard = f"{k:05}-of-{len(split.shards):05}"
            final = self._folder / f"{self._name}-{name}.array_record-{shard}"
            (self._folder / f"{k}.tmp").rename(final)
        return split

    def finish(self, description: str, made: dict[str, Any]) -> None:
        """Write the metadata of TFDS, and how the features were made as made.json."""
        template = tfds.core.ShardedFileTemplate(
            data_dir=self._folder, dataset_name=self._name, filetype_suffix="array_record"
        )
        infos = [
            tfds.core.SplitInfo(
                name=name,
                shard_lengths=split.shards,
                num_bytes=split.bytes,
                filename_template=template.replace(split=name),
            )
            for name, split in self.splits.items()
        ]
        tfds.folder_dataset.write_metadata(
            data_dir=self._folder,
            features=self._features,
            split_infos=infos,
            description=description,
            check_data=False,
        )
        (self._folder / "made.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
