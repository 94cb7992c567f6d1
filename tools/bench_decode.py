"""Compare the speed of JPEG decoders, alone and with the resizing of the training pipeline.

    python tools/bench_decode.py [--images photos.zip] --size 224

Without --images they are generated, 500 x 375, quality 90. Candidates alternate; tables show
medians of the CPU time of one thread, also valid on a busy machine. `error` is the mean absolute
difference, in gray levels of 255, to full decoding and antialiased bilinear resizing with Pillow.
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg
from PIL import Image
from tqdm import tqdm

from cap_pretrain.cli import arguments
from cap_pretrain.data import images
from cap_pretrain.data.builders.files import image_names, open_files
from cap_pretrain.errors import UserError

Decoder = Callable[[bytes], np.ndarray]


def photograph(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return an image, uint8 [height, width, 3], with a natural 1/f spectrum and some grain."""
    image = np.full((height, width, 3), 128, np.float32)
    for cells in (4, 16, 64, 256):
        shape = (max(2, height * cells // 512), max(2, width * cells // 512), 3)
        octave = rng.normal(size=shape).astype(np.float32)
        image += (
            90 / cells**0.5 * cv2.resize(octave, (width, height), interpolation=cv2.INTER_CUBIC)
        )
    image += rng.normal(scale=3, size=(height, width, 1))
    return np.clip(image, 0, 255).astype(np.uint8)


def generated(count: int, width: int, height: int, quality: int) -> list[bytes]:
    """Return `count` generated photographs as JPEG files."""
    rng = np.random.default_rng(0)
    files = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(photograph(rng, width, height)).save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    return files


def decoders() -> dict[str, Decoder]:
    """Return the candidates that decode at full size, by name."""

    def opencv(data: bytes) -> np.ndarray:
        return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), 1), cv2.COLOR_BGR2RGB)

    def pillow(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    return {
        "cap_pretrain": images.decode,
        "simplejpeg": simplejpeg.decode_jpeg,
        "OpenCV": opencv,
        "Pillow": pillow,
    }


def resizers(size: int) -> dict[str, Decoder]:
    """Return the candidates that decode and resize to [size, size, 3], by name."""
    plain = decoders()

    def reduced(data: bytes) -> np.ndarray:
        return images.resize(images.decode(data, min_size=size), size)

    def full(data: bytes) -> np.ndarray:
        return images.resize(images.decode(data), size)

    def eighths(data: bytes) -> np.ndarray:
        return images.resize(simplejpeg.decode_jpeg(data, min_height=size, min_width=size), size)

    def opencv_area(data: bytes) -> np.ndarray:
        return cv2.resize(plain["OpenCV"](data), (size, size), interpolation=cv2.INTER_AREA)

    def opencv_linear(data: bytes) -> np.ndarray:
        return cv2.resize(plain["OpenCV"](data), (size, size), interpolation=cv2.INTER_LINEAR)

    def pillow(data: bytes) -> np.ndarray:
        return _shrink(Image.open(io.BytesIO(data)).convert("RGB"), size)

    def pillow_draft(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (size, size))
        return _shrink(image.convert("RGB"), size)

    return {
        "cap_pretrain, reduced by 1, 2, 4 or 8": reduced,
        "cap_pretrain, full": full,
        "simplejpeg, reduced by eighths": eighths,
        "OpenCV, exact areas": opencv_area,
        "OpenCV, not antialiased": opencv_linear,
        "Pillow, draft": pillow_draft,
        "Pillow": pillow,
    }


def measure(candidates: dict[str, Decoder], files: list[bytes], rounds: int) -> dict[str, float]:
    """Return the median images/s of each candidate; they alternate in every round."""
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for name, decode in candidates.items():
            start = time.thread_time()
            for data in files:
                decode(data)
            rates[name].append(len(files) / (time.thread_time() - start))
    return {name: statistics.median(rate) for name, rate in rates.items()}


def print_table(
    title: str, candidates: dict[str, Decoder], files: list[bytes], rounds: int
) -> None:
    """Print a Markdown table, fastest first, with ratios to the candidate "Pillow"."""
    rates = measure(candidates, files, rounds)
    print(f"\n| {title} | images/s | ms/image | to Pillow | error |\n|---|---|---|---|---|")
    for name in sorted(rates, key=rates.get, reverse=True):
        errors = [
            np.abs(candidates[name](data).astype(int) - candidates["Pillow"](data)).mean()
            for data in files[:20]
        ]
        rate = rates[name]
        print(
            f"| {name} | {rate:.0f} | {1000 / rate:.2f} | {rate / rates['Pillow']:.2f}x "
            f"| {statistics.mean(errors):.2f} |"
        )


def _shrink(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))


def _run(args: argparse.Namespace) -> int:
    if args.images:
        archive = open_files(args.images)
        names = [n for n in image_names(archive) if n.lower().endswith((".jpg", ".jpeg"))]
        files = [archive.read(name) for name in names[: args.count]]
    else:
        files = generated(args.count, args.width, args.height, args.quality)
    print(f"{len(files)} JPEGs, {sum(map(len, files)) / len(files) / 1000:.0f} kB on average")
    print_table("decode", decoders(), files, args.rounds)
    print_table(f"decode, resize to {args.size}", resizers(args.size), files, args.rounds)
    return 0


def main() -> int:
    """Run the tool and return its exit status."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("--images", help="folder or zip of JPEGs; default: generated images")
    parser.add_argument("--count", type=int, default=100, help="number of images; default: 100")
    parser.add_argument("--width", type=int, default=500, help="pixels of generated images")
    parser.add_argument("--height", type=int, default=375, help="pixels of generated images")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of generated images")
    parser.add_argument("--size", type=int, default=224, help="pixels to resize to; default: 224")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    return arguments.run(_run, parser.parse_args(), catch=(UserError,))


if __name__ == "__main__":
    sys.exit(main())
