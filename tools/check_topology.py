"""Predict memory and step time of a config on TPUs or GPUs with their compilers, without either.

The program is cap_pretrain/commands/check_topology.py.
"""

import sys

from cap_pretrain.commands.check_topology import main

if __name__ == "__main__":
    sys.exit(main())
