"""Caption image files with the learner of a run.

    cap caption --checkpoint runs/cappa --method beam --json photo.jpg scan.tif
    cap caption --checkpoint runs/vqa --question "How many dogs are there?" photo.jpg
    cap caption --checkpoint runs/cappa --method sample --captions 5 --top_p 0.9 a.jpg
    cap caption --checkpoint runs/cappa --method beam --groups 2 --captions 2 a.jpg

The output has a line per file: "NAME: CAPTION" or "NAME: not captioned: REASON"; with --json, an
object with "image" and "caption" or "error". With --scores or several --captions it has a line per
caption, "NAME: CAPTION  (log p -6.21, -0.69 per token)", and the object has "captions": a list of
objects with "caption", "log_prob", "log_prob_per_token" and "tokens". A log-probability is in
nats, the sum over the tokens of the caption and the one that ends it, of the learner's softmax,
before any of the rules below. --question needs a run trained on questions (see
configs/coco_captioning.py). The newest valid checkpoint is used, with averaged parameters if it has
them. Exit status: 0 all have captions; 1 some have none; 2 there is no captioner, or an option is
wrong.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from cap_pretrain import inputs, untrusted
from cap_pretrain.checkpoints.open import open_learner
from cap_pretrain.cli import arguments
from cap_pretrain.cli.captioning import ScoredCaptioner, image_paths, read_image, scored_captioner
from cap_pretrain.data.views import View
from cap_pretrain.errors import UserError
from cap_pretrain.models.decoding import Decoding

BLANK = "the learner wrote no text; answers need a run that was trained on questions"


def caption_files(
    paths: Sequence[str], captions: ScoredCaptioner, batch_size: int, view: View
) -> Iterator[dict[str, Any]]:
    """Yield {"image": path} and "caption" with "captions", or "error", in the order of paths."""
    for start in range(0, len(paths), batch_size):
        batch = [(path, read_image(path, view)) for path in paths[start : start + batch_size]]
        pixels = [found for _, found in batch if not isinstance(found, str)]
        written = iter(captions(np.stack(pixels)) if pixels else ())
        for path, found in batch:
            if isinstance(found, str):
                yield {"image": path, "error": found}
            elif (several := next(written))[0].text.strip():
                listed = [one.as_json() for one in several]
                yield {"image": path, "caption": several[0].text, "captions": listed}
            else:
                yield {"image": path, "error": BLANK}


def lines(result: dict[str, Any], as_json: bool, scores: bool) -> Iterator[str]:
    """Yield the lines of a result of `caption_files`."""
    if as_json:
        kept = result if scores else {k: v for k, v in result.items() if k != "captions"}
        yield json.dumps(kept, ensure_ascii=False)
    elif "error" in result:
        yield f"{result['image']}: not captioned: {result['error']}"
    elif not scores:
        yield f"{result['image']}: {result['caption']}"
    else:
        for one in result["captions"]:
            score = f"log p {one['log_prob']:.2f}, {one['log_prob_per_token']:.2f} per token"
            yield f"{result['image']}: {one['caption']}  ({score})"


def _run(args: argparse.Namespace) -> int:
    paths = image_paths(args.images)
    batch_size = min(args.batch_size, len(paths))
    options = {field.name: getattr(args, field.name) for field in dataclasses.fields(Decoding)}
    decoding = Decoding(**options)
    with arguments.waiting(f"Loading {args.checkpoint}"):
        learner = open_learner(args.checkpoint, args.step)
    captions = scored_captioner(learner, decoding, batch_size, args.seed, args.question)
    scores = args.scores or decoding.captions > 1
    failed = False
    results = caption_files(paths, captions, batch_size, inputs.view(learner.config))
    # The lines themselves show the progress on a terminal.
    hidden = True if sys.stdout.isatty() else None
    for result in tqdm(results, total=len(paths), unit="img", disable=hidden):
        failed |= "error" in result
        for line in lines(result, args.json, scores):
            print(untrusted.printable(line), flush=True)
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status (see above)."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image file, or folder of some")
    arguments.add_checkpoint(parser)
    parser.add_argument("--question", default="", help="question to answer about each image")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--batch_size", type=arguments.positive_int, default=16, help="default: 16")
    parser.add_argument("--seed", type=int, default=0, help="random seed of --method sample")
    parser.add_argument(
        "--scores", action="store_true", help="print log-probabilities, as with several captions"
    )
    group = parser.add_argument_group("decoding", "docs/decoding.md has more on these options")
    arguments.add_fields(group, Decoding)
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    return arguments.run(_run, args, catch=(UserError,))


if __name__ == "__main__":
    sys.exit(main())
