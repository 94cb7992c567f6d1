"""Measures how fast `scenes` renders and describes images on one core.

python tools/bench_scenes.py --image_size=64
"""

import argparse
import sys
import time

from cap_pretrain.data.scenes.source import SPLITS, Scenes
from cap_pretrain.errors import UserError


def images_per_second(source: Scenes, seconds: float) -> float:
    """Whole records (image and five captions) per second, after one to fill the tables."""
    source[0]
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        source[done % len(source)]
        done += 1
    return done / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure")
    args = parser.parse_args()
    try:
        source = Scenes(args.split, args.image_size)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    speed = images_per_second(source, args.seconds)
    print(f"{speed:,.0f} images/s on one core at {args.image_size} px, captions included")
    return 0


if __name__ == "__main__":
    sys.exit(main())
