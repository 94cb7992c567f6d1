"""Draw which parts of an image a captioner attends to for each word of its caption.

The program is cap_pretrain/commands/show_attention.py.
"""

import sys

from cap_pretrain.commands.show_attention import main

if __name__ == "__main__":
    sys.exit(main())
