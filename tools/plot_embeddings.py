"""Plot a run's embeddings of images, captions or words in two dimensions.

The program is cap_pretrain/commands/plot_embeddings.py.
"""

import sys

from cap_pretrain.commands.plot_embeddings import main

if __name__ == "__main__":
    sys.exit(main())
