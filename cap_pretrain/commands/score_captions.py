"""Score captions like the COCO evaluation: BLEU, METEOR, ROUGE-L, CIDEr-D, SPICE.

    cap score --annotations captions_val2014.json --results results.json
    cap score --results runs/captioning/evals/test/5000.json
    cap score --tokenized tokenized.json.gz

Annotations are COCO's {"annotations": [{"image_id": 1, "caption": "a dog"}, …]}; results a list of
such entries, or a file of the evaluator `caption_scores`, which has references. Tokenized text is
{"gts": {"1": ["a dog", …]}, "res": {"1": ["a dog"]}}; with annotations and results, it checks the
Python tokenizer. All files may be gzipped. The last line of the output is JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cap_pretrain import files
from cap_pretrain.cli import arguments
from cap_pretrain.data.builders.formats import annotated
from cap_pretrain.errors import UserError
from cap_pretrain.evals.metrics import caption_metrics, caption_tokens

Texts = dict[str, list[str]]
"""Captions by image id."""


def read_annotations(path: Path) -> Texts:
    """Read the captions of each image from a COCO annotation file."""
    references: Texts = {}
    for image, entry in _entries(path, "annotations"):
        references.setdefault(image, []).append(_text(path, entry["caption"]))
    return references


def read_results(path: Path) -> tuple[Texts, Texts]:
    """Read the caption of each image, and the references of images that have some."""
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
    """Read the tokenized caption of each image, and the references."""
    content = files.read_json(path)
    try:
        captions, references = (
            {image: _texts(path, texts) for image, texts in content[key].items()}
            for key in ("res", "gts")
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: 'gts' and 'res' must hold texts by image.") from error
    for image, texts in captions.items():
        if len(texts) != 1:
            raise UserError(f"{path}: image {image} has {len(texts)} captions in 'res', not one.")
    return captions, references


def check_images(captions: Texts, references: Texts, results: Path, annotations: Path) -> None:
    """Raise UserError if some images are in only one of the two files."""
    if missing := [image for image in references if image not in captions]:
        raise UserError(
            f"{results}: no caption for {_some(missing)} of {annotations}; add them, or score "
            "the others with --subset."
        )
    if missing := [image for image in captions if not references.get(image)]:
        raise UserError(f"{annotations}: no references for {_some(missing)} of {results}.")


def agreement(captions: Texts, references: Texts, tokenized: tuple[Texts, Texts]) -> float:
    """Return the fraction of texts that the Python tokenizer tokenizes as in `tokenized`."""
    same = []
    for texts, expected in zip((captions, references), tokenized, strict=True):
        for image in texts:
            found = caption_tokens.python(texts[image])
            same += [a == b for a, b in zip(found, expected[image], strict=True)]
    return sum(same) / len(same)


def _read(args: argparse.Namespace) -> tuple[Texts, Texts, dict[str, Any]]:
    pair = None
    if args.results:
        captions, references = read_results(args.results)
        origin = args.results
        if args.annotations:
            origin, references = args.annotations, read_annotations(args.annotations)
            if args.subset:
                references = {i: texts for i, texts in references.items() if i in captions}
        elif not references:
            raise UserError(f"{args.results}: has no references; add --annotations.")
        check_images(captions, references, args.results, origin)
        pair = captions, references
    if not args.tokenized:
        if pair is None:
            raise UserError("--results: is missing; name the captions to score.")
        return *pair, {}
    tokenized = read_tokenized(args.tokenized)
    check_images(*tokenized, args.tokenized, args.tokenized)
    if pair is None:
        return *tokenized, {}
    for ours, theirs in zip(pair, tokenized, strict=True):
        if {i: len(texts) for i, texts in ours.items()} != {i: len(t) for i, t in theirs.items()}:
            raise UserError(f"{args.tokenized}: its images or captions differ from {args.results}.")
    return *tokenized, {"python_tokenizer_agreement": agreement(*pair, tokenized)}


def _entries(path: Path, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (image id, entry) of each entry in a list, or in the list `key` of an object."""
    content = files.read_json(path)
    entries = content.get(key) if isinstance(content, dict) else content
    if not isinstance(entries, list) or not entries:
        found = ", ".join(content)[:50] if isinstance(content, dict) else repr(content)[:50]
        raise UserError(f"{path}: has no list of {key} (found: {found}).")
    for entry in entries:
        if not isinstance(entry, dict) or not {"image_id", "caption"} <= entry.keys():
            raise UserError(f"{path}: {repr(entry)[:50]} has no image_id and caption.")
    return [(annotated.id_text(path, entry["image_id"]), entry) for entry in entries]


def _texts(path: Path, texts: Any) -> list[str]:
    if not isinstance(texts, list):
        raise UserError(f"{path}: {repr(texts)[:50]} is not a list of texts.")
    return [_text(path, text) for text in texts]


def _text(path: Path, text: Any) -> str:
    if not isinstance(text, str):
        raise UserError(f"{path}: the caption {repr(text)[:50]} is not text.")
    return text


def _some(images: list[str]) -> str:
    return f"image {images[0]}" if len(images) == 1 else f"{len(images)} images ({images[0]}, …)"


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status: 0 done, 2 the user's mistake."""
    return arguments.run(_run, _parse(argv))


def _run(args: argparse.Namespace) -> int:
    captions, references, extra = _read(args)
    with arguments.waiting(f"Scoring {len(captions):,} captions"):
        scores = caption_metrics.score(
            references,
            {image: texts[0] for image, texts in captions.items()},
            tokenizer="none" if args.tokenized else args.tokenizer,
            spice=args.spice,
            protocol=args.protocol,
        )
    if args.per_image:
        rows = [
            {"image_id": i, **{name: by_image[i] for name, by_image in scores.per_image.items()}}
            for i in captions
        ]
        files.write_text(args.per_image, json.dumps(rows, indent=0) + "\n")
    print(f"{scores.images} images, {scores.references} references; tokenizer: {scores.tokenizer}")
    print(*scores.table(), sep="\n")
    print(json.dumps(scores.metrics | scores.protocol() | extra))
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.documented_parser(__doc__)
    parser.add_argument(
        "--annotations", type=arguments.run_path, help="references; required if RESULTS has none"
    )
    parser.add_argument("--results", type=arguments.run_path, help="captions")
    parser.add_argument(
        "--tokenized", type=arguments.run_path, help="tokenized captions and references"
    )
    parser.add_argument("--subset", action="store_true", help="score only the images of RESULTS")
    parser.add_argument(
        "--per_image", type=arguments.run_path, help="also write the scores of each image here"
    )
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
