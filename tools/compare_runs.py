"""Check that two workdirs hold bit-identical checkpoints and the same logged metrics.

The program is cap_pretrain/commands/compare_runs.py.
"""

import sys

from cap_pretrain.commands.compare_runs import main

if __name__ == "__main__":
    sys.exit(main())
