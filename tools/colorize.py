"""Draw the colors that a colorization run predicts for gray images.

The program is cap_pretrain/commands/colorize.py.
"""

import sys

from cap_pretrain.commands.colorize import main

if __name__ == "__main__":
    sys.exit(main())
