r"""Generate permutations of nine tiles for the jigsaw task, far from each other.

    cap permutations --count 100 --rule min --out data/permutations_100.txt

Training reads the file `learner.file`, or generates them by `learner.permutations` and `.rule`.
"""

import argparse
import sys

from cap_pretrain.cli import arguments
from cap_pretrain.learners import permutations


def _run(args: argparse.Namespace) -> int:
    with arguments.waiting(f"Choosing {args.count} permutations"):
        chosen = permutations.greedy(args.count, args.rule, args.seed)
    permutations.write(args.out, chosen)
    mean, smallest = permutations.distances(chosen)
    print(
        f"{args.out}: {args.count} permutations; distance {mean:.4f} on average, {smallest} least"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0 done, 2 the user's mistake."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("--count", type=int, default=100, help="default: 100")
    rules = permutations.RULES
    parser.add_argument(
        "--rule", choices=rules, default=rules[0], help=f"distance to maximize; default: {rules[0]}"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--out", required=True, type=arguments.local_path, help="output file, one per line"
    )
    return arguments.run(_run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
