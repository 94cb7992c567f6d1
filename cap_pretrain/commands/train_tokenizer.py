"""Train a tokenizer on the captions and phrases of a dataset: sentencepiece, or whole words.

    cap tokenizer --data scenes --vocab_size 300 --limit 9999 --out data/tokenizer
    cap tokenizer --data data/my_data --kind words --min_count 6 --out data/words

--config.text.tokenizer takes the path of the result: OUT/tokenizer.model, with its settings in
OUT/tokenizer.json, or OUT/words.tsv, which includes them.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from cap_pretrain.cli import arguments
from cap_pretrain.data.sources import passes
from cap_pretrain.data.sources.base import parse_mixture
from cap_pretrain.data.sources.open import GENERATED, cache_of, open_source
from cap_pretrain.data.text.tokenizers import (
    SentencePieceTokenizer,
    source_captions,
    train_sentencepiece,
)
from cap_pretrain.data.text.words import Rules, WordTokenizer, write_words

_SMALL_IMAGE = 16  # pixels; generated datasets render an image per caption, which is not used


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0 done, 2 the user's mistake."""
    return arguments.run(_run, _parse(argv))


def _run(args: argparse.Namespace) -> int:
    captions = tqdm(_captions(args), unit=" captions", disable=None)
    print(_words(args, captions) if args.kind == "words" else _pieces(args, captions))
    return 0


def _pieces(args: argparse.Namespace, captions: Iterable[str]) -> str:
    path = train_sentencepiece(
        captions, args.out, args.vocab_size, lower=not args.keep_case, seed=args.seed
    )
    return f"{path}: {SentencePieceTokenizer(path).vocab_size} pieces"


def _words(args: argparse.Namespace, captions: Iterable[str]) -> str:
    rules = Rules(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Rules)})
    path = write_words(captions, args.out, rules, lower=not args.keep_case)
    return f"{path}: {WordTokenizer(path).vocab_size} words, including three special ones"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.documented_parser(__doc__)
    parser.add_argument(
        "--data", required=True, help="dataset, its path or URL, or a mixture (a+b)"
    )
    parser.add_argument("--data_dir", default="", help="folder of datasets given by name")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument(
        "--limit",
        type=int,
        help="number of examples, spread evenly; of URLs, wds: and parquet: in whole blocks",
    )
    parser.add_argument("--keep_case", action="store_true", help="do not lower-case the captions")
    parser.add_argument(
        "--out", required=True, type=arguments.local_path, help="folder to write into"
    )
    kinds = ("sentencepiece", "words")
    parser.add_argument("--kind", choices=kinds, default=kinds[0], help=f"default: {kinds[0]}")
    pieces = parser.add_argument_group("sentencepiece")
    pieces.add_argument("--vocab_size", type=int, default=32000, help="default: 32000, as in Cap")
    pieces.add_argument("--seed", type=int, default=0, help="default: 0")
    group = parser.add_argument_group("words", "see Rules in cap_pretrain/data/text/words.py")
    for field in dataclasses.fields(Rules):
        if isinstance(field.default, bool):
            group.add_argument(f"--{field.name}", action="store_true")
        else:
            kind, default = type(field.default), field.default
            group.add_argument(
                f"--{field.name}", type=kind, default=default, help=f"default: {default}"
            )
    return parser.parse_args(argv)


def _captions(args: argparse.Namespace) -> Iterator[str]:
    for name, _ in parse_mixture(args.data):
        cache = cache_of(name, args.data_dir)
        options = {"image_size": _SMALL_IMAGE, "data_dir": args.data_dir, "cache": cache}
        source = open_source(name, args.split, **options)
        # The expressions of scenes have the words of their captions.
        phrases = name not in GENERATED
        yield from source_captions(source, args.limit, passes.BLOCK if cache else 0, phrases)


if __name__ == "__main__":
    sys.exit(main())
