"""Store an encoder's features of the images of a dataset, as a dataset to train on.

The program is cap_pretrain/commands/extract_features.py.
"""

import sys

from cap_pretrain.commands.extract_features import main

if __name__ == "__main__":
    sys.exit(main())
