"""`python -m cap_pretrain.commands` is the program `cap`."""

import sys

from cap_pretrain.commands.program import main

if __name__ == "__main__":
    sys.exit(main())
