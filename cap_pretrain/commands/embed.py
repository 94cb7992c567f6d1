"""Compute a vector for every image of a folder and store them in one file.

    cap embed runs/siglip photos --out photos.npz
    cap embed exported/cappa photos more/a.jpg --out photos.parquet --dtype float16

MODEL is a workdir, a checkpoint in it, an exported folder, or whatever else --config.encoder takes.
OUT holds the path of each image, as given, and its vector: an npz has the arrays name [N] and
vector [N, D], a parquet file such columns. Files that cannot be read are left out, named and
counted. `cap search` searches OUT. Exit status: 0 all have vectors; 1 some have none; 2 the user's
mistake.
"""

import argparse
import sys

import numpy as np
from absl import logging
from tqdm import tqdm

from cap_pretrain import untrusted
from cap_pretrain.cli import arguments, vectors
from cap_pretrain.errors import UserError

DTYPES = ("float32", "float16")
SHOWN = 20  # files that cannot be read and are named; the others are only counted


def _run(args: argparse.Namespace) -> int:
    from cap_pretrain.api import load
    from cap_pretrain.api.images import listed

    vectors.check_name(args.out)
    items = listed(args.images)
    model = load(args.model, step=args.step)
    what = args.what or model.default_vector
    unreadable: dict[str, str] = {}
    names: list[str] = []
    parts: list[np.ndarray] = []
    with tqdm(total=len(items), unit="img", disable=None) as bar:  # None: only on terminals
        for own, rows in model.embed_batches(
            args.images, what=what, batch_size=args.batch_size, unreadable=unreadable
        ):
            names += own
            parts.append(rows.astype(args.dtype))
            bar.update(len(names) + len(unreadable) - bar.n)
    for name, reason in list(unreadable.items())[:SHOWN]:
        print(untrusted.printable(f"{name}: left out: {reason}"), file=sys.stderr)
    if not names:
        raise UserError(f"{args.images[0]}: none of {len(items)} images can be read.")
    found = np.concatenate(parts)
    if not np.isfinite(found).all():
        raise UserError(
            f"--dtype: the vectors of {args.model} are not finite in {args.dtype}; "
            "use float32, or check the weights."
        )
    about = {"model": args.model, "identity": model.identity, "what": what}
    vectors.write(args.out, vectors.Embedded(names, found, **about))
    left_out = f"; {len(unreadable):,} files could not be read" if unreadable else ""
    size = f"{found.shape[1]} {args.dtype} each ({what})"
    print(f"wrote {args.out}: {len(names):,} images, {size}{left_out}")
    return int(bool(unreadable))


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status (see above)."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="workdir, checkpoint or exported folder")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="folder of images, or image")
    parser.add_argument(
        "--out", required=True, type=arguments.local_path, help="file to write, *.npz or *.parquet"
    )
    parser.add_argument(
        "--what",
        default="",
        help="pooled, tokens, projected, or a layer such as block_6; default: projected for clip "
        "and siglip, so that texts can be compared, else pooled",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="default: float32")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the newest")
    parser.add_argument("--batch_size", type=arguments.positive_int, default=64, help="default: 64")
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    return arguments.run(_run, args)


if __name__ == "__main__":
    sys.exit(main())
