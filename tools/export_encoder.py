"""Export the encoder of a run as a folder that `transformers` loads as SiglipVisionModel.

The program is cap_pretrain/commands/export_encoder.py.
"""

import sys

from cap_pretrain.commands.export_encoder import main

if __name__ == "__main__":
    sys.exit(main())
