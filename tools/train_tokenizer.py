"""Train a tokenizer on the captions of a dataset: sentencepiece, or whole words.

The program is cap_pretrain/commands/train_tokenizer.py.
"""

import sys

from cap_pretrain.commands.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
