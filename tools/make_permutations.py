"""Generate permutations of nine tiles for the jigsaw task, far from each other.

The program is cap_pretrain/commands/make_permutations.py.
"""

import sys

from cap_pretrain.commands.make_permutations import main

if __name__ == "__main__":
    sys.exit(main())
