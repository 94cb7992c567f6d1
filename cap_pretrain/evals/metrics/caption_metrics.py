"""Caption metrics: BLEU, METEOR, ROUGE-L, CIDEr-D and SPICE, as in the COCO evaluation.

The scorers are pycocoevalcap's, called one by one; one that cannot run on a machine is skipped and
reported so. Nothing is downloaded unless asked for, printed, or written next to their code.

    BLEU     Papineni et al. 2002    METEOR   Denkowski and Lavie 2014 (version 1.5)
    ROUGE-L  Lin 2004                SPICE    Anderson et al. 2016
    CIDEr    Vedantam et al. 2015. What is commonly called "CIDEr" is their CIDEr-D. It weights
             words by how few images have them in their references (IDF), so values on different
             sets of images, or on a set and its subset, are not comparable.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.evals.metrics import brownlee_bleu, caption_tokens
from cap_pretrain.evals.metrics.caption_tokens import (
    UnavailableError,
    find_java,
    java,
    package_folder,
)

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")

TOKENIZERS = {
    "auto": "`ptb` where Java runs, else `python`",
    "ptb": "Stanford's PTBTokenizer, which all published results use; needs Java",
    "python": "an approximation of it, without Java",
    "none": "captions and references are already words and spaces",
}
# How results name the tokenizer.
_STAMPS = {
    "ptb": "PTB",
    "python": "Python (not PTB)",
    "none": "none (text as given)",
    "brownlee": "brownlee (markers, no words of one letter)",
}

MODELS_HOST = "nlp.stanford.edu"  # Where pycocoevalcap downloads SPICE's models from

SPICE = {
    "no": "not at all",
    "installed": "if its models are installed (nothing is downloaded)",
    "download": f"its models are downloaded from {MODELS_HOST} if they are not installed",
}

PROTOCOLS = {
    "coco": "all metrics, as in the COCO evaluation",
    "brownlee": "BLEU as in the public code of the recipe merge, for comparison with its results",
    "seed002": "the former name of brownlee",
}

_NO_PTB = "tokenizer: 'ptb' cannot run, {}; install Java or use 'auto'."

MAX_WORDS, MAX_CHARACTERS = 1000, 20_000
"""Longer texts are cut: a few thousand equal words exhaust METEOR's memory."""

# Image -> its caption, and image -> its reference captions.
Captions = Mapping[Any, str]
References = Mapping[Any, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """The metrics of a set of captions.

    Attributes:
        metrics: over all images, those of `METRICS` that could be computed.
        per_image: metric -> image -> score. BLEU of a single caption means little: BLEU-4 is 0
            where no four consecutive words match.
        tokenizer: what split the text into words.
        skipped: metric (or tokenizer) -> why it was not computed (or used).
        images: number of images; CIDEr's IDF is that of their references.
        references: number of references.
        mended: number of texts that were too long, or held half of a pair of surrogates.
    """

    metrics: dict[str, float]
    per_image: dict[str, dict[Any, float]]
    tokenizer: str
    skipped: dict[str, str]
    images: int
    references: int
    mended: int = 0

    def protocol(self) -> dict[str, Any]:
        """Return, as JSON, what must be the same to compare the metrics with others."""
        return {
            "images": self.images,
            "references": self.references,
            "idf": f"of the references of these {self.images} images",
            "tokenizer": self.tokenizer,
            "skipped": self.skipped,
            "mended": self.mended,
        }

    def notes(self) -> tuple[str, ...]:
        """Return what was skipped or mended, a line each."""
        notes = tuple(f"{name:8}  skipped: {why}" for name, why in self.skipped.items())
        if not self.mended:
            return notes
        return (
            *notes,
            f"{self.mended} texts were mended: cut to {MAX_WORDS:,} words or {MAX_CHARACTERS:,} "
            "characters, or with U+FFFD for half of a pair of surrogates",
        )

    def table(self) -> tuple[str, ...]:
        """Return the metrics, a line each, and what was skipped."""
        lines = [f"{name:8}{self.metrics[name]:9.5f}" for name in METRICS if name in self.metrics]
        return (*lines, *self.notes())


def score(
    references: References,
    captions: Captions,
    *,
    tokenizer: str = "auto",
    spice: str = "installed",
    protocol: str = "coco",
    check: Callable[[], None] = lambda: None,
) -> Scores:
    """Score captions, one for each image, against the references, at least one for each.

    Args:
        references: by image.
        captions: by image.
        tokenizer: one of `TOKENIZERS`.
        spice: one of `SPICE`: whether to compute it.
        protocol: one of `PROTOCOLS`; "brownlee" has its own tokenizer and only BLEU.
        check: called after each scorer; an exception it raises ends the scoring.

    Raises:
        UserError: pycocoevalcap is not installed, the tokenizer "ptb" does not run, an option is
            invalid, or the references have no words.
        ValueError: captions and references are not of the same images.
    """
    check_options(tokenizer, spice, protocol)
    protocol = current_name(protocol)
    if references.keys() != captions.keys() or not all(references.values()):
        raise ValueError("every image needs one caption and at least one reference")
    captions, cut = _mended(captions)
    by_image = {image: _mended(dict(enumerate(texts))) for image, texts in references.items()}
    references = {image: list(texts.values()) for image, (texts, _) in by_image.items()}
    cut += sum(n for _, n in by_image.values())
    skipped: dict[str, str] = {}
    scorers: dict[tuple[str, ...], Callable[[References, Captions], Found]]
    if protocol == "brownlee":
        references = {
            image: list(map(brownlee_bleu.cut, texts)) for image, texts in references.items()
        }
        captions = {image: brownlee_bleu.cut(text) for image, text in captions.items()}
        stamp, scorers = _STAMPS[protocol], {METRICS[:4]: brownlee_bleu.bleu}
    else:
        references, captions, stamp = _words(references, captions, tokenizer, skipped)
        scorers = {
            METRICS[:4]: _bleu,
            ("METEOR",): _meteor,
            ("ROUGE_L",): _rouge,
            ("CIDEr",): _cider,
            ("SPICE",): functools.partial(_spice, when=spice),
        }
    metrics: dict[str, float] = {}
    per_image: dict[str, dict[Any, float]] = {}
    for names, scorer in scorers.items():
        try:
            found = dict(zip(names, scorer(references, captions), strict=True))
        except UnavailableError as error:
            skipped |= dict.fromkeys(names, str(error))
            found = {}
        check()
        for name, (total, each) in found.items():
            metrics[name] = float(total)
            per_image[name] = {i: float(s) for i, s in zip(captions, each, strict=True)}
    count = sum(map(len, references.values()))
    return Scores(metrics, per_image, stamp, skipped, len(captions), count, cut)


def check_options(tokenizer: str, spice: str, protocol: str = "coco") -> None:
    """Raise UserError if an option of `score` is invalid, or pycocoevalcap or Java is missing."""
    for name, value, options in (
        ("tokenizer", tokenizer, TOKENIZERS),
        ("spice", spice, SPICE),
        ("protocol", protocol, PROTOCOLS),
    ):
        if value not in options:
            raise UserError(f"{name}: there is no {value!r}.{did_you_mean(value, options)}")
    package_folder()
    if tokenizer == "ptb":
        try:
            find_java()
        except UnavailableError as error:
            raise UserError(_NO_PTB.format(error)) from error


def current_name(protocol: str) -> str:
    """Return the name of a protocol that results record, given it or its former name."""
    return "brownlee" if protocol == "seed002" else protocol


def _mended(captions: Captions) -> tuple[dict[Any, str], int]:
    """Return captions that every scorer can read, and how many differ from the given ones."""
    mended = {}
    for image, text in captions.items():
        # A lone surrogate is not UTF-8, which Java reads; it would end the tokenizer for all texts.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if len(text) > MAX_CHARACTERS or len(text.split()) > MAX_WORDS:
            text = " ".join(text[:MAX_CHARACTERS].split()[:MAX_WORDS])
        mended[image] = text
    return mended, sum(mended[image] != text for image, text in captions.items())


def _words(
    references: References, captions: Captions, tokenizer: str, skipped: dict[str, str]
) -> tuple[dict[Any, list[str]], dict[Any, str], str]:
    """Return references and captions as words and spaces, and the name of the tokenizer used."""
    texts = [*captions.values(), *itertools.chain.from_iterable(references.values())]
    if tokenizer in ("auto", "ptb"):
        try:
            texts, tokenizer = caption_tokens.ptb(texts), "ptb"
        except UnavailableError as error:
            if tokenizer == "ptb":
                raise UserError(_NO_PTB.format(error)) from error
            skipped["PTB"], tokenizer = str(error), "python"
    if tokenizer == "python":
        texts = caption_tokens.python(texts)
    words = (" ".join(text.split()) for text in texts)
    captions = {image: next(words) for image in captions}
    by_image = {image: [next(words) for _ in several] for image, several in references.items()}
    if not any(itertools.chain.from_iterable(by_image.values())):
        raise UserError("caption metrics: the references contain no words; check the file.")
    # The scorers match captions and references by their order.
    return {image: by_image[image] for image in captions}, captions, _STAMPS[tokenizer]


# Each scorer takes tokenized references and captions of the same images in the same order. For each
# of its metrics it returns the value over all images and the score of each image.
Found = list[tuple[float, Sequence[float]]]


def _bleu(references: References, captions: Captions) -> Found:
    from pycocoevalcap.bleu.bleu import Bleu

    totals, scores = Bleu(4).compute_score(references, _listed(captions), verbose=0)
    return list(zip(totals, scores, strict=True))


def _rouge(references: References, captions: Captions) -> Found:
    from pycocoevalcap.rouge.rouge import Rouge

    return [Rouge().compute_score(references, _listed(captions))]


def _cider(references: References, captions: Captions) -> Found:
    from pycocoevalcap.cider.cider import Cider

    if len({frozenset(texts) for texts in references.values()}) == 1:
        raise UnavailableError(
            "always 0, since it weights words by how few images have them, and all images have the "
            "same references"
            if len(references) > 1
            else "always 0 for a single image"
        )
    return [Cider().compute_score(references, _listed(captions))]


def _listed(captions: Captions) -> dict[Any, list[str]]:
    return {image: [caption] for image, caption in captions.items()}


def _meteor(references: References, captions: Captions) -> Found:
    """Compute METEOR by Java, without pycocoevalcap's wrapper: its destructor hangs on failure."""
    jar = package_folder() / "meteor" / "meteor-1.5.jar"
    program = ("-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm")
    with java(*program, images=len(captions)) as process:
        stdin, stdout = cast(IO[str], process.stdin), cast(IO[str], process.stdout)

        def ask(*parts: str) -> str:
            stdin.write(" ||| ".join(parts) + "\n")
            stdin.flush()
            return stdout.readline().strip()

        statistics = []
        for image, caption in captions.items():
            texts = (text.replace("|||", "") for text in (*references[image], caption))
            statistics.append(ask("SCORE", *texts))
        scores = [float(ask("EVAL", *statistics))]
        scores += [float(stdout.readline()) for _ in captions]
    *scores, total = scores
    return [(total, scores)]


def _spice(references: References, captions: Captions, when: str) -> Found:
    """Compute SPICE with the program in pycocoevalcap, made for Java 8; later ones may fail."""
    if when == "no":
        raise UnavailableError("not asked for")
    find_java()  # before downloading models
    folder = package_folder() / "spice"
    models = [folder / "lib" / f"stanford-corenlp-3.6.0{kind}.jar" for kind in ("", "-models")]
    if not all(path.exists() for path in models):
        if when == "installed":
            raise UnavailableError(
                "its models are not installed; spice=download downloads them, some 400 MB, from "
                f"{MODELS_HOST}"
            )
        _download_spice_models()
    entries = [
        {"image_id": k, "test": caption, "refs": references[image]}
        for k, (image, caption) in enumerate(captions.items())
    ]
    with tempfile.TemporaryDirectory() as temporary:
        given, found = Path(temporary, "captions.json"), Path(temporary, "scores.json")
        given.write_text(json.dumps(entries), encoding="utf-8")
        program = ("-Xmx8G", "-jar", str(folder / "spice-1.0.jar"), str(given))
        options = ("-out", str(found), "-subset", "-silent")
        with java(*program, *options, images=len(captions)) as process:
            process.communicate()
            if process.returncode:
                raise ValueError(f"exit status {process.returncode}")
            results = json.loads(found.read_text(encoding="utf-8"))
            by_image = {item["image_id"]: float(item["scores"]["All"]["f"]) for item in results}
            scores = [by_image[k] for k in range(len(captions))]
    return [(sum(scores) / len(scores), scores)]


def _download_spice_models() -> None:
    from pycocoevalcap.spice.get_stanford_models import get_stanford_models

    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints its progress
            get_stanford_models()
    except (OSError, zipfile.BadZipFile) as error:
        raise UnavailableError(f"its models could not be downloaded ({error})") from error
