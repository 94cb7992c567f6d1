"""Caption image files with the learner of a run, one output line per file.

    python tools/caption.py --checkpoint runs/cappa --method beam --json photo.jpg scan.tif
    python tools/caption.py --checkpoint runs/vqa --question "How many dogs are there?" photo.jpg

A line is "NAME: CAPTION" or "NAME: not captioned: REASON"; with --json, an object with "image" and
"caption" or "error". --question needs a run trained on questions (see configs/coco_captioning.py).
The newest valid checkpoint is used, with averaged parameters if it has them. Exit status: 0 all
have captions; 1 some have none; 2 there is no captioner, or an option is wrong.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from cap_pretrain import untrusted
from cap_pretrain.checkpoints.load import load_learner
from cap_pretrain.cli import arguments
from cap_pretrain.cli.captioning import Captioner, captioner, read_image
from cap_pretrain.errors import UserError
from cap_pretrain.models.decoding import Decoding

BLANK = "the learner wrote no text; answers need a run that was trained on questions"


def caption_files(
    paths: Sequence[str], captions: Captioner, batch_size: int, data: ConfigDict
) -> Iterator[dict[str, str]]:
    """Yield {"image": path} with a "caption" or an "error", in the order of the paths."""
    for start in range(0, len(paths), batch_size):
        batch = [(path, read_image(path, data)) for path in paths[start : start + batch_size]]
        pixels = [found for _, found in batch if not isinstance(found, str)]
        written = iter(captions(np.stack(pixels)) if pixels else ())
        for path, found in batch:
            if isinstance(found, str):
                yield {"image": path, "error": found}
            elif (text := next(written)).strip():
                yield {"image": path, "caption": text}
            else:
                yield {"image": path, "error": BLANK}


def _run(args: argparse.Namespace) -> int:
    batch_size = min(args.batch_size, len(args.images))
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(Decoding)}
    decoding = Decoding(**options)
    learner = load_learner(args.checkpoint, step=args.step)
    captions = captioner(learner, decoding, batch_size, args.seed, args.question)
    failed = False
    for result in caption_files(args.images, captions, batch_size, learner.config.data):
        failed |= "error" in result
        text = result.get("caption", f"not captioned: {result.get('error')}")
        line = json.dumps(result, ensure_ascii=False) if args.json else f"{result['image']}: {text}"
        print(untrusted.printable(line), flush=True)
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status (see above)."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file")
    arguments.add_checkpoint(parser)
    parser.add_argument("--question", default="", help="question to answer about each image")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--batch_size", type=arguments.positive_int, default=16, help="default: 16")
    parser.add_argument("--seed", type=int, default=0, help="random seed of --method sample")
    group = parser.add_argument_group("decoding", "see Decoding in cap_pretrain/models/decoding.py")
    for field in dataclasses.fields(Decoding):
        kind, default = type(field.default), field.default
        group.add_argument(
            f"--{field.name}", type=kind, default=default, help=f"default: {default}"
        )
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    return arguments.run(_run, args, catch=(UserError,))


if __name__ == "__main__":
    sys.exit(main())
