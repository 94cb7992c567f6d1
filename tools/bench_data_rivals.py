"""Load the batches of tools/bench_data.py with torch and Pillow, with webdataset, or with tf.data.

It takes options as JSON and imports nothing of this project, so it can run in another Python that
has TensorFlow. For each line of its input it measures one round and prints the result as JSON.
"""

import io
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # random crops, as in cap_pretrain.data.images
AHEAD = 2  # batches that each thread or worker prefetches


def cpu_seconds() -> float:
    """Return the CPU time of this process, its threads and its current worker processes."""
    seconds = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        seconds += sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")  # proc(5): utime, stime
    return seconds


def measure(batches: Iterator, count: int, ready: int) -> dict[str, float]:
    """Return the number of images and the seconds of `count` batches after `ready` others."""
    for _ in range(ready):
        next(batches)
    wall, cpu, images = time.perf_counter(), cpu_seconds(), 0
    for _ in range(count):
        images += len(next(batches))
    return {
        "images": images,
        "wall": time.perf_counter() - wall,
        "cpu": cpu_seconds() - cpu,
    }


class Photographs:
    """An endless torch dataset of images, uint8 [size, size, 3], drawn with the index as seed.

    `crop` "random" crops at random, otherwise whole images are resized; `flip` flips half of them.
    """

    def __init__(self, paths: list[str], size: int, crop: str, flip: bool):
        self._paths, self._size, self._crop, self._flip = paths, size, crop, flip

    def __len__(self) -> int:
        return 2**31

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        data = Path(self._paths[rng.integers(len(self._paths))]).read_bytes()
        return square(data, self._size, self._crop, self._flip, rng)


def square(data: bytes, size: int, crop: str, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """Decode, crop and resize an image with Pillow, uint8 [size, size, 3]; see `Photographs`."""
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    if crop == "random":
        image = image.crop(_random_box(*image.size, rng))
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, ...]:
    for _ in range(10):
        kept = width * height * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(*map(math.log, RATIO)))
        w, h = round(math.sqrt(kept * aspect)), round(math.sqrt(kept / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return left, top, left + w, top + h
    return 0, 0, width, height


def torch_batches(paths: list[str], options: dict) -> Iterator:
    """Return batches of a torch DataLoader with `threads` worker processes."""
    from torch.utils.data import DataLoader

    dataset = Photographs(paths, options["size"], options["crop"], options["flip"])
    return iter(
        DataLoader(
            dataset,
            options["batch_size"],
            num_workers=options["threads"],
            prefetch_factor=AHEAD,
            multiprocessing_context="fork",
        )
    )


def webdataset_batches(paths: list[str], options: dict) -> Iterator:
    """Return the batches of webdataset's own loader, which reads tars one after the other.

    Tars are drawn at random, and examples from a buffer of 1000, as in its documentation.
    """
    import webdataset

    rng = np.random.default_rng()
    load = lambda data: square(data, options["size"], options["crop"], options["flip"], rng)
    dataset = webdataset.WebDataset(paths, resampled=True, shardshuffle=False)
    dataset = dataset.shuffle(1000).to_tuple("jpg", "txt").map_tuple(load, bytes.decode)
    loader = webdataset.WebLoader(
        dataset.batched(options["batch_size"]),
        batch_size=None,
        num_workers=options["threads"],
        prefetch_factor=AHEAD,
        multiprocessing_context="fork",
    )
    return (images for images, _ in loader)


def tf_batches(paths: list[str], options: dict) -> Iterator:
    """Return uint8 batches of tf.data, which decodes crops only; antialiasing takes longest."""
    import tensorflow as tf

    size = options["size"]

    def load(path):
        data = tf.io.read_file(path)
        if options["crop"] == "random":
            begin, extent, _ = tf.image.sample_distorted_bounding_box(
                tf.image.extract_jpeg_shape(data),
                tf.zeros([0, 0, 4]),
                min_object_covered=0,
                area_range=AREA,
                aspect_ratio_range=RATIO,
                max_attempts=10,
                use_image_if_no_bounding_boxes=True,
            )
            window = tf.concat([begin[:2], extent[:2]], 0)
            image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        else:
            image = tf.image.decode_jpeg(data, channels=3)
        image = tf.image.resize(image, (size, size), antialias=options["antialias"])
        if options["flip"]:
            image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.round(image), tf.uint8)

    settings = tf.data.Options()
    settings.threading.private_threadpool_size = options["threads"]
    dataset = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
    dataset = dataset.map(load, num_parallel_calls=options["threads"])
    dataset = dataset.batch(options["batch_size"], drop_remainder=True).prefetch(AHEAD)
    return iter(dataset.with_options(settings))


def main() -> int:
    """Run the tool and return its exit status; 3 if the library is not installed."""
    options = json.loads(sys.argv[1])
    paths = sorted(str(path) for path in Path(options["folder"]).iterdir() if path.is_file())
    kinds = {"torch": torch_batches, "webdataset": webdataset_batches}
    make = kinds.get(options["kind"], tf_batches)
    try:
        batches = make(paths, options)
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 3
    for _ in sys.stdin:
        round_ = measure(batches, options["batches"], AHEAD * (options["threads"] + 1))
        print(json.dumps(round_), flush=True)
    os._exit(0)  # neither library stops its threads and workers by itself


if __name__ == "__main__":
    sys.exit(main())
