r"""Makes the permutations that a jigsaw puzzle is about: orders of nine tiles, far from each other.

    python tools/make_permutations.py --count 100 --rule min --out data/permutations_100.txt
    python -m cap_pretrain.main --config=configs/pretext.py:task=jigsaw,data=data/my_images \\
        --workdir=runs/jigsaw --config.learner.file=data/permutations_100.txt

Without a file, training makes its own, by `learner.permutations` and `learner.rule`.
"""

import argparse
import sys
from pathlib import Path

from cap_pretrain.errors import UserError
from cap_pretrain.learners import permutations


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 the user's mistake."""
    args = _parse(argv)
    try:
        chosen = permutations.greedy(args.count, args.rule, args.seed)
        permutations.write(args.out, chosen)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    mean, smallest = permutations.distances(chosen)
    print(
        f"{args.out}: {args.count} permutations; distance {mean:.4f} on average, {smallest} least"
    )
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="default: 100")
    rules = permutations.RULES
    parser.add_argument(
        "--rule", choices=rules, default=rules[0], help=f"which distance; default: {rules[0]}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path, help="the file to write, one a line")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
