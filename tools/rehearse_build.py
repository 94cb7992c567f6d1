"""Check that a build of web data counts drops exactly, survives kills, and uses constant memory.

The program is cap_pretrain/commands/rehearse_build.py.
"""

import sys

from cap_pretrain.commands.rehearse_build import main

if __name__ == "__main__":
    sys.exit(main())
