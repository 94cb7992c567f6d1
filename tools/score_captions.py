"""Scores captions as the COCO evaluation does: BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE.

    python tools/score_captions.py --annotations captions_val2014.json --results results.json
    python tools/score_captions.py --results runs/captioning/evals/test/5000.json
    python tools/score_captions.py --tokenized tokenized.json.gz

Annotations are COCO's: {"annotations": [{"image_id": 1, "caption": "a dog"}, …]}; results are a
list of {"image_id": 1, "caption": "a dog"}, or what the evaluator `caption_scores` wrote, which
has its references with it. Tokenized text is {"gts": {"1": ["a dog", …]}, "res": {"1": ["a dog"]}};
with annotations and results beside it, what the Python tokenizer makes of them is compared to it.
Any of the files may be gzipped. The last line printed is JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cap_pretrain import files
from cap_pretrain.errors import UserError
from cap_pretrain.evals.metrics import caption_metrics, caption_tokens

Texts = dict[str, list[str]]


def read_annotations(path: Path) -> Texts:
    """Returns the captions of each image."""
    references: Texts = {}
    for image, entry in _entries(path, "annotations"):
        references.setdefault(image, []).append(_text(path, entry["caption"]))
    return references


def read_results(path: Path) -> tuple[Texts, Texts]:
    """Returns the caption of each image, and the references of those that come with some."""
    captions: Texts = {}
    references: Texts = {}
    for image, entry in _entries(path, "captions"):
        if image in captions:
            raise UserError(f"{path}: image {image} has more than one caption; leave one.")
        captions[image] = [_text(path, entry["caption"])]
        if "references" in entry:
            references[image] = _texts(path, entry["references"])
    return captions, references


def read_tokenized(path: Path) -> tuple[Texts, Texts]:
    """Returns the caption of each image, and the references."""
    content = files.read_json(path)
    try:
        captions, references = (
            {image: _texts(path, texts) for image, texts in content[key].items()}
            for key in ("res", "gts")
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: no texts by image in 'gts' and 'res' of it.") from error
    for image, texts in captions.items():
        if len(texts) != 1:
            raise UserError(f"{path}: image {image} has {len(texts)} captions in 'res', not one.")
    return captions, references


def check_images(captions: Texts, references: Texts, results: Path, annotations: Path) -> None:
    """Raises UserError if some images are in one of the two files only."""
    if missing := [image for image in references if image not in captions]:
        raise UserError(
            f"{results}: no caption of {_some(missing)} of {annotations}; add them, or score "
            "the others with --subset."
        )
    if missing := [image for image in captions if not references.get(image)]:
        raise UserError(f"{annotations}: no references of {_some(missing)} of {results}.")


def agreement(captions: Texts, references: Texts, tokenized: tuple[Texts, Texts]) -> float:
    """Returns the share of the texts that the Python tokenizer makes as they are `tokenized`."""
    same = []
    for texts, expected in zip((captions, references), tokenized, strict=True):
        for image in texts:
            cut = caption_tokens.python(texts[image])
            same += [a == b for a, b in zip(cut, expected[image], strict=True)]
    return sum(same) / len(same)


def _read(args: argparse.Namespace) -> tuple[Texts, Texts, dict[str, Any]]:
    """Returns captions, references, and what else is to be said of them."""
    pair = None
    if args.results:
        captions, references = read_results(args.results)
        where = args.results
        if args.annotations:
            where, references = args.annotations, read_annotations(args.annotations)
            if args.subset:
                references = {i: texts for i, texts in references.items() if i in captions}
        elif not references:
            raise UserError(f"{args.results}: has no references in it; name --annotations.")
        check_images(captions, references, args.results, where)
        pair = captions, references
    if not args.tokenized:
        if pair is None:
            raise UserError("--results: name the captions to be scored.")
        return *pair, {}
    tokenized = read_tokenized(args.tokenized)
    check_images(*tokenized, args.tokenized, args.tokenized)
    if pair is None:
        return *tokenized, {}
    for ours, theirs in zip(pair, tokenized, strict=True):
        if {i: len(texts) for i, texts in ours.items()} != {i: len(t) for i, t in theirs.items()}:
            raise UserError(f"{args.tokenized}: its texts are not those of {args.results}.")
    return *tokenized, {"python_tokenizer_agreement": agreement(*pair, tokenized)}


def _entries(path: Path, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns (image, entry) of a list, or of the list `key` of an object."""
    content = files.read_json(path)
    entries = content.get(key) if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        found = ", ".join(content)[:50] if isinstance(content, dict) else repr(content)[:50]
        raise UserError(f"{path}: no list of {key} in it (found: {found}).")
    for entry in entries:
        if not isinstance(entry, dict) or not {"image_id", "caption"} <= entry.keys():
            raise UserError(f"{path}: {repr(entry)[:50]} has no image_id and caption.")
    # Where image names are numbers, some files have them as text.
    return [(str(entry["image_id"]), entry) for entry in entries]


def _texts(path: Path, texts: Any) -> list[str]:
    if not isinstance(texts, list):
        raise UserError(f"{path}: {repr(texts)[:50]} is not a list of texts.")
    return [_text(path, text) for text in texts]


def _text(path: Path, text: Any) -> str:
    if not isinstance(text, str):
        raise UserError(f"{path}: the caption {repr(text)[:50]} is not a text.")
    return text


def _some(images: list[str]) -> str:
    return f"image {images[0]}" if len(images) == 1 else f"{len(images)} images ({images[0]}, …)"


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 the user's mistake."""
    args = _parse(argv)
    try:
        captions, references, remarks = _read(args)
        scores = caption_metrics.score(
            references,
            {image: texts[0] for image, texts in captions.items()},
            tokenizer="none" if args.tokenized else args.tokenizer,
            spice=args.spice,
            protocol=args.protocol,
        )
        if args.per_image:
            rows = [
                {
                    "image_id": i,
                    **{name: by_image[i] for name, by_image in scores.per_image.items()},
                }
                for i in captions
            ]
            files.write_text(args.per_image, json.dumps(rows, indent=0) + "\n")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{scores.images} images, {scores.references} references; tokenizer: {scores.tokenizer}")
    print(*scores.table(), sep="\n")
    print(json.dumps(scores.metrics | scores.protocol() | remarks))
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--annotations", type=Path, help="the references; needed if RESULTS has none"
    )
    parser.add_argument("--results", type=Path, help="the captions")
    parser.add_argument("--tokenized", type=Path, help="captions and references, cut into words")
    parser.add_argument("--subset", action="store_true", help="only the images of RESULTS")
    parser.add_argument("--per_image", type=Path, help="also write the scores of each image here")
    for name, options, default in (
        ("--tokenizer", caption_metrics.TOKENIZERS, "auto"),
        ("--spice", caption_metrics.SPICE, "installed"),
        ("--protocol", caption_metrics.PROTOCOLS, "coco"),
    ):
        meaning = "; ".join(f"{option}: {meaning}" for option, meaning in options.items())
        parser.add_argument(
            name, choices=options, default=default, help=f"{meaning} (default: {default})"
        )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
