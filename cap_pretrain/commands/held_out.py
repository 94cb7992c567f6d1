"""List the images of a dataset to exclude them from others (build_dataset --held_out).

    cap held_out data/coco --splits val test --to coco.held_out

Lines are "exact HASH" (of the file), "perceptual HASH" (of the content, which also finds copies of
another size or quality) and, with --ids, "id ID".
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from cap_pretrain import untrusted
from cap_pretrain.cli import arguments
from cap_pretrain.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0 done, 2 the user's mistake."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("dataset", help="path of a built dataset, like data/coco")
    parser.add_argument("--splits", nargs="+", required=True, help="splits to list")
    parser.add_argument(
        "--to", type=arguments.local_path, required=True, metavar="FILE", help="output file"
    )
    ids = "list ids too; they must identify the same images in the datasets to be built"
    parser.add_argument("--ids", action="store_true", help=ids)
    return arguments.run(_run, parser.parse_args(argv), catch=(UserError,))


def _run(args: argparse.Namespace) -> int:
    from cap_pretrain import files

    listed = list(_lines(args.dataset, args.splits, args.ids))
    lines = [
        f"# {untrusted.printable(args.dataset)}: {', '.join(args.splits)}",
        *itertools.chain(*listed),
        "",
    ]
    try:
        files.write_text(args.to, "\n".join(lines))
    except OSError as error:
        raise UserError(f"--to {args.to}: cannot be written ({error.strerror}).") from error
    broken = sum(len(own) < 2 + args.ids for own in listed)
    note = f", {broken} of them broken, by their file's hash only" if broken else ""
    print(f"{len(listed)} images listed in {args.to}{note}")
    return 0


def _lines(dataset: str, splits: Sequence[str], ids: bool) -> Iterator[list[str]]:
    from cap_pretrain.data import images
    from cap_pretrain.data.builders import hashes
    from cap_pretrain.data.sources import passes
    from cap_pretrain.data.sources.open import cache_of, open_source

    for split in splits:
        source = open_source(dataset, split, image_size=hashes.LOOK, cache=cache_of(dataset))
        indices = itertools.chain.from_iterable(passes.whole(source))
        for index in tqdm(indices, desc=split, total=len(source), unit="img", disable=None):
            example = source[index]
            data = example["image"]
            if not isinstance(data, bytes):
                raise UserError(
                    f"dataset {dataset}: draws its images, so there are no files of images to list."
                )
            lines = [f"exact {hashes.exact(data):016x}"]
            with contextlib.suppress(images.ImageError):
                lines.append(
                    f"perceptual {hashes.perceptual(images.decode(data, hashes.LOOK)):016x}"
                )
            yield lines + [hashes.held_out_id(example["id"])] * ids


if __name__ == "__main__":
    sys.exit(main())
