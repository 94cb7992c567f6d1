"""List the images of a dataset to exclude them from others (build_dataset --held_out).

The program is cap_pretrain/commands/held_out.py.
"""

import sys

from cap_pretrain.commands.held_out import main

if __name__ == "__main__":
    sys.exit(main())
