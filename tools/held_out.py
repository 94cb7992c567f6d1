"""Lists the images of a dataset, so that others are built without them (build_dataset --held_out).

    python tools/held_out.py data/coco --splits val test --to coco.held_out
    python tools/build_dataset.py cc3m … --held_out coco.held_out

A line of the list is "exact HASH" (of the file), "perceptual HASH" (of what it shows, so that
copies at another size or quality are found, too) or, with --ids, "id ID".
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from cap_pretrain.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 the user's mistake."""
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", help="a dataset that was built, like data/coco")
    parser.add_argument("--splits", nargs="+", required=True, help="that are held out")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="the list")
    what = "also ids, which must then mean the same in the datasets that are built"
    parser.add_argument("--ids", action="store_true", help=what)
    args = parser.parse_args(argv)
    try:
        count = _write(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} images listed in {args.to}")
    return 0


def _write(args: argparse.Namespace) -> int:
    from cap_pretrain import files

    listed = list(_lines(args.dataset, args.splits, args.ids))
    lines = [f"# {args.dataset}: {', '.join(args.splits)}", *itertools.chain(*listed), ""]
    try:
        files.write_text(args.to, "\n".join(lines))
    except OSError as error:
        raise UserError(f"--to {args.to}: cannot be written ({error.strerror}).") from error
    return len(listed)


def _lines(dataset: str, splits: Sequence[str], ids: bool) -> Iterator[list[str]]:
    """Yields the lines of each image."""
    from cap_pretrain.data import images
    from cap_pretrain.data.builders import hashes
    from cap_pretrain.data.sources.open import open_source

    for split in splits:
        source = open_source(dataset, split, image_size=hashes.LOOK)
        for index in range(len(source)):
            example = source[index]
            data = example["image"]
            seen = hashes.perceptual(images.decode(data, hashes.LOOK))
            lines = [f"exact {hashes.exact(data):016x}", f"perceptual {seen:016x}"]
            yield lines + [f"id {example['id']}"] * ids


if __name__ == "__main__":
    sys.exit(main())
