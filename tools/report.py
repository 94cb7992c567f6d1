"""Make one HTML page of a run or of several side by side.

The program is cap_pretrain/commands/report.py.
"""

import sys

from cap_pretrain.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
