"""Run the trials of a sweep, report their status, and tabulate or plot their results.

The program is cap_pretrain/commands/sweep.py.
"""

import sys

from cap_pretrain.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main())
