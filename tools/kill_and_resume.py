"""Check that a run that is killed and resumed repeatedly ends exactly like an uninterrupted one.

The program is cap_pretrain/commands/kill_and_resume.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this code, installed or not

from cap_pretrain.commands.kill_and_resume import main

if __name__ == "__main__":
    sys.exit(main())
