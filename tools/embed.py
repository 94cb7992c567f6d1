"""Compute a vector for every image of a folder and store them in one file.

The program is cap_pretrain/commands/embed.py.
"""

import sys

from cap_pretrain.commands.embed import main

if __name__ == "__main__":
    sys.exit(main())
