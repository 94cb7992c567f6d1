"""Score captions like the COCO evaluation: BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE.

The program is cap_pretrain/commands/score_captions.py.
"""

import sys

from cap_pretrain.commands.score_captions import main

if __name__ == "__main__":
    sys.exit(main())
