"""Draw a grid of images with their captions, from a dataset or from a run's evaluation.

The program is cap_pretrain/commands/contact_sheet.py.
"""

import sys

from cap_pretrain.commands.contact_sheet import main

if __name__ == "__main__":
    sys.exit(main())
