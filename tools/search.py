"""Find the images that are nearest to a text or an image, among those that `cap embed` embedded.

The program is cap_pretrain/commands/search.py.
"""

import sys

from cap_pretrain.commands.search import main

if __name__ == "__main__":
    sys.exit(main())
