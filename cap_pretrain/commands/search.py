"""Find the images that are nearest to a text or an image, among those that `cap embed` embedded.

    cap search photos.npz --text "a red boat"
    cap search photos.npz --image query.jpg --top 5 --model runs/siglip

A line is the cosine similarity and the path of an image, the nearest first; with --json, an object
with "score" and "image". Texts need vectors of a dual encoder, such as clip or siglip. Exit status:
0 done; 2 the user's mistake.
"""

import argparse
import json
import sys

import numpy as np
from absl import logging

from cap_pretrain import untrusted
from cap_pretrain.cli import arguments, vectors
from cap_pretrain.errors import UserError


def query(stored: vectors.Embedded, args: argparse.Namespace) -> np.ndarray:
    """Return the vector [D] of the text or the image in the arguments.

    Raises UserError if the model is not the one that computed the stored vectors, or, for a text,
    if it embeds none.
    """
    from cap_pretrain.api import load

    model = load(args.model or stored.model)
    if model.identity != stored.identity:
        raise UserError(
            f"--model: {model.path} is not the model that computed {args.vectors} (which was "
            f"{stored.model}, at another step, or has changed); give that one, or embed the images "
            "again."
        )
    if args.image:
        return model.embed(args.image, what=stored.what)[0]
    if "embed_text" not in model.methods:
        raise UserError(
            f"--text: {model.path} is a {model.learner}, which has no vectors of texts; search "
            "with --image, or embed the images with a clip or siglip run."
        )
    if stored.what != "projected":
        raise UserError(
            f"--text: {args.vectors} holds {stored.what} vectors, which texts cannot be compared "
            "with; embed the images with --what projected."
        )
    return model.embed_text(args.text)[0]


def _run(args: argparse.Namespace) -> int:
    stored = vectors.read(args.vectors)
    for index, score in vectors.nearest(stored.vectors, query(stored, args), args.top):
        name = stored.names[index]
        line = f"{score:7.4f}  {name}"
        if args.json:
            line = json.dumps({"score": round(score, 6), "image": name}, ensure_ascii=False)
        print(untrusted.printable(line))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status (see above)."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument(
        "vectors", type=arguments.local_path, metavar="VECTORS", help="file written by `cap embed`"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="words to search for")
    what.add_argument("--image", help="image file to search for")
    parser.add_argument("--model", default="", help="default: the path that VECTORS names")
    parser.add_argument("--top", type=arguments.positive_int, default=10, help="default: 10")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    return arguments.run(_run, args)


if __name__ == "__main__":
    sys.exit(main())
