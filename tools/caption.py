"""Caption image files with the learner of a run, one output line per file.

The program is cap_pretrain/commands/caption.py.
"""

import sys

from cap_pretrain.commands.caption import main

if __name__ == "__main__":
    sys.exit(main())
