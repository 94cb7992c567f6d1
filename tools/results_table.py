"""Print evaluation results of several runs as a Markdown table.

The program is cap_pretrain/commands/results_table.py.
"""

import sys

from cap_pretrain.commands.results_table import main

if __name__ == "__main__":
    sys.exit(main())
