"""Captions image files with what a run has learned: one line a file, in their order.

    python tools/caption.py --checkpoint runs/cappa photo.jpg scan.tif
    python tools/caption.py --checkpoint runs/cappa --method beam --json *.jpg
    python tools/caption.py --checkpoint runs/vqa --question "How many dogs are there?" photo.jpg

A line is the file's name and its caption, or why it has none: "NAME: not captioned: REASON". With
--json it is an object with "image" and "caption" or "error". With --question the caption is the
answer to it, of a run that has learned to answer (see configs/coco_captioning.py). The newest sound
checkpoint is used, its averaged parameters if there are any.

Exit status: 0 every file has a caption; 1 some have none; 2 there is no captioner to use, or an
option is wrong, and nothing was captioned.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from cap_pretrain.checkpoints.load import load_learner
from cap_pretrain.cli.captioning import Captioner, captioner, read_image
from cap_pretrain.errors import UserError
from cap_pretrain.models.decoding import Decoding


def caption_files(
    paths: Sequence[str], captions: Captioner, batch_size: int, data: ConfigDict
) -> Iterator[dict[str, str]]:
    """Yields {"image": path} with a "caption" or an "error" in order of the paths."""
    for start in range(0, len(paths), batch_size):
        batch = [(path, read_image(path, data)) for path in paths[start : start + batch_size]]
        pixels = [found for _, found in batch if not isinstance(found, str)]
        written = iter(captions(np.stack(pixels)) if pixels else ())
        for path, found in batch:
            if isinstance(found, str):
                yield {"image": path, "error": found}
            else:
                yield {"image": path, "caption": next(written)}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, as said above."""
    args = _parse(argv)
    logging.set_verbosity(logging.ERROR)
    batch_size = min(args.batch_size, len(args.images))
    try:
        given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Decoding)}
        how = Decoding(**given)
        learner = load_learner(args.checkpoint, step=args.step)
        write = captioner(learner, how, batch_size, args.seed, args.question)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = False
    for result in caption_files(args.images, write, batch_size, learner.config.data):
        failed |= "error" in result
        told = result.get("caption", f"not captioned: {result.get('error')}")
        line = json.dumps(result, ensure_ascii=False) if args.json else f"{result['image']}: {told}"
        print(line, flush=True)
    return int(failed)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="any image file")
    parser.add_argument("--checkpoint", required=True, type=Path, help="the workdir of a run")
    parser.add_argument("--step", type=int, help="which of its checkpoints; default: the newest")
    parser.add_argument("--question", default="", help="about each image, to be answered")
    parser.add_argument("--json", action="store_true", help="print JSON, an object a line")
    parser.add_argument("--batch_size", type=_positive, default=16, help="default: 16")
    parser.add_argument("--seed", type=int, default=0, help="of --method sample")
    how = parser.add_argument_group("decoding", "see Decoding in cap_pretrain/models/decoding.py")
    for field in dataclasses.fields(Decoding):
        kind, default = type(field.default), field.default
        how.add_argument(f"--{field.name}", type=kind, default=default, help=f"default: {default}")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
