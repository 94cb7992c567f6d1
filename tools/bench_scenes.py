"""Measures how fast `scenes` renders on one core, or draws a sheet of examples.

python tools/bench_scenes.py --image_size=64
python tools/bench_scenes.py --contact_sheet=scenes.png --columns=6 --rows=3
"""

import argparse
import sys
import textwrap
import time
from pathlib import Path

from cap_pretrain.data.scenes import SPLITS, Scenes
from cap_pretrain.errors import UserError


def images_per_second(source: Scenes, seconds: float) -> float:
    """Whole records (image and five captions) per second, after one to fill the tables."""
    source[0]
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        source[done % len(source)]
        done += 1
    return done / (time.perf_counter() - start)


def draw_sheet(source: Scenes, columns: int, rows: int, path: Path) -> None:
    """Writes the first examples in a grid, each above its first caption."""
    from PIL import Image, ImageDraw, ImageFont

    size, gap = source.image_size, 8
    width = max(size, 112)
    font = ImageFont.load_default(max(10, size // 14))
    line = font.getbbox("Ag")[3] + 2
    letters = int(width / font.getlength("n"))
    lines = [textwrap.wrap(source[k]["captions"][0], letters) for k in range(columns * rows)]
    step_x, step_y = width + gap, size + gap + line * max(map(len, lines))
    sheet = Image.new("RGB", (columns * step_x + gap, rows * step_y + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for k, wrapped in enumerate(lines):
        x, y = gap + k % columns * step_x, gap + k // columns * step_y
        sheet.paste(Image.fromarray(source[k]["image"]), (x, y))
        draw.multiline_text((x, y + size + 1), "\n".join(wrapped), "black", font, spacing=2)
    sheet.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure")
    parser.add_argument("--contact_sheet", type=Path, help="write a picture instead of measuring")
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--rows", type=int, default=3)
    args = parser.parse_args()
    try:
        source = Scenes(args.split, args.image_size)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if args.contact_sheet:
        draw_sheet(source, args.columns, args.rows, args.contact_sheet)
        print(f"wrote {args.contact_sheet}")
    else:
        speed = images_per_second(source, args.seconds)
        print(f"{speed:,.0f} images/s on one core at {args.image_size} px, captions included")
    return 0


if __name__ == "__main__":
    sys.exit(main())
