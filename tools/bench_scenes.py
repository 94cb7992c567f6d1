"""Measure how fast the dataset `scenes` renders and captions images on one core."""

import argparse
import sys
import time

from cap_pretrain.cli import arguments
from cap_pretrain.data.scenes.source import SPLITS, Scenes
from cap_pretrain.errors import UserError


def images_per_second(source: Scenes, seconds: float) -> float:
    """Return examples (an image and five captions) per second, after one that fills caches."""
    source[0]
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        source[done % len(source)]
        done += 1
    return done / (time.perf_counter() - start)


def _run(args: argparse.Namespace) -> int:
    source = Scenes(args.split, args.image_size)
    speed = images_per_second(source, args.seconds)
    print(f"{speed:,.0f} images/s on one core at {args.image_size} px, captions included")
    return 0


def main() -> int:
    """Run the tool and return its exit status."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="duration; default: 5")
    return arguments.run(_run, parser.parse_args(), catch=(UserError,))


if __name__ == "__main__":
    sys.exit(main())
