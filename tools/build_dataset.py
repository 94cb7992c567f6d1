"""Build a dataset in TFDS format (ArrayRecord) from images and captions, or from class folders.

The program is cap_pretrain/commands/build_dataset.py.
"""

import sys

from cap_pretrain.commands.build_dataset import main

if __name__ == "__main__":
    sys.exit(main())
