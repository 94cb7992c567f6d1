"""How good captions are: BLEU, METEOR, ROUGE-L, CIDEr-D and SPICE, as the COCO evaluation has them.

The scorers are pycocoevalcap's, called one by one: what cannot run on a machine is left out and
said, and the rest is scored. Nothing is fetched, printed, or written next to their code.

  BLEU     Papineni et al. 2002    METEOR   Denkowski and Lavie 2014 (version 1.5)
  ROUGE-L  Lin 2004                SPICE    Anderson et al. 2016
  CIDEr    Vedantam et al. 2015; everybody's "CIDEr" is their CIDEr-D. Words count by how few images
           have them in their references (IDF), so figures of different sets of images do not
           compare, nor do those of a set and its part.
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
from typing import Any

from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.evals.metrics import brownlee_bleu, caption_tokens
from cap_pretrain.evals.metrics.caption_tokens import Unavailable, find_java, java, package_folder

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "SPICE")

TOKENIZERS = {
    "auto": "`ptb` where Java runs, else `python`",
    "ptb": "Stanford's PTBTokenizer, which all published figures are made with; needs Java",
    "python": "rules much like it, without Java",
    "none": "captions and references are words and spaces already",
}
_STAMPS = {
    "ptb": "PTB",
    "python": "Python (not PTB)",
    "none": "none (text as given)",
    "seed002": "seed002 (markers, no words of one letter)",
}

# Where pycocoevalcap has SPICE's models from.
MODELS_HOST = "nlp.stanford.edu"

SPICE = {
    "no": "not at all",
    "installed": "if its models are there (nothing is fetched)",
    "download": f"its models are fetched from {MODELS_HOST} if they are not there",
}

PROTOCOLS = {
    "coco": "all metrics, as the COCO evaluation has them",
    "seed002": "BLEU as in the public code of the recipe merge, for comparing with its figures",
}

# What was said of each image, and what should have been.
Captions = Mapping[Any, str]
References = Mapping[Any, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """How good captions are.

    Attributes:
      metrics: over all images, of those of `METRICS` that could be computed.
      per_image: the same for each image: metric -> image -> score. BLEU of a single caption is not
        meant for much: it is 0 where no four words match.
      tokenizer: what cut the text into words.
      skipped: metric (or tokenizer) -> why it was not computed (or used).
      images: how many there are; CIDEr's IDF is that of their references.
      references: how many there are.
    """

    metrics: dict[str, float]
    per_image: dict[str, dict[Any, float]]
    tokenizer: str
    skipped: dict[str, str]
    images: int
    references: int

    def protocol(self) -> dict[str, Any]:
        """What one has to know to compare the figures, as JSON."""
        return {
            "images": self.images,
            "references": self.references,
            "idf": f"of the references of these {self.images} images",
            "tokenizer": self.tokenizer,
            "skipped": self.skipped,
        }

    def table(self) -> tuple[str, ...]:
        """The figures, a line each, and what was left out."""
        lines = [f"{name:8}{self.metrics[name]:9.5f}" for name in METRICS if name in self.metrics]
        return (*lines, *(f"{name:8}  skipped: {why}" for name, why in self.skipped.items()))


def score(
    references: References,
    captions: Captions,
    *,
    tokenizer: str = "auto",
    spice: str = "installed",
    protocol: str = "coco",
    check: Callable[[], None] = lambda: None,
) -> Scores:
    """Scores captions by the references of the same images.

    Args:
      references: at least one for each image.
      captions: one for each image.
      tokenizer: one of `TOKENIZERS`.
      spice: one of `SPICE`: when it is tried.
      protocol: one of `PROTOCOLS`; all but "coco" have their own words and no SPICE.
      check: called after each scorer; what it raises ends the scoring.

    Raises:
      UserError: pycocoevalcap is not installed, the tokenizer asked for does not run, an option is
        none of those, or the references have no words.
      ValueError: captions and references are not of the same images.
    """
    check_options(tokenizer, spice, protocol)
    if references.keys() != captions.keys() or not all(references.values()):
        raise ValueError("every image needs one caption and at least one reference")
    skipped: dict[str, str] = {}
    if protocol == "seed002":
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
    figures: dict[str, float] = {}
    per_image: dict[str, dict[Any, float]] = {}
    for names, scorer in scorers.items():
        try:
            found = dict(zip(names, scorer(references, captions), strict=True))
        except Unavailable as error:
            skipped |= dict.fromkeys(names, str(error))
            found = {}
        check()
        for name, (total, each) in found.items():
            figures[name] = float(total)
            per_image[name] = {i: float(s) for i, s in zip(captions, each, strict=True)}
    count = sum(map(len, references.values()))
    return Scores(figures, per_image, stamp, skipped, len(captions), count)


def check_options(tokenizer: str, spice: str, protocol: str = "coco") -> None:
    """Raises UserError for an option that is none, and where pycocoevalcap is not installed."""
    for name, value, options in (
        ("tokenizer", tokenizer, TOKENIZERS),
        ("spice", spice, SPICE),
        ("protocol", protocol, PROTOCOLS),
    ):
        if value not in options:
            raise UserError(f"{name}: there is no {value!r}.{did_you_mean(value, options)}")
    package_folder()


def _words(
    references: References, captions: Captions, tokenizer: str, skipped: dict[str, str]
) -> tuple[dict[Any, list[str]], dict[Any, str], str]:
    """Returns references and captions as words and spaces, and what made them so."""
    texts = [*captions.values(), *itertools.chain.from_iterable(references.values())]
    if tokenizer in ("auto", "ptb"):
        try:
            texts, tokenizer = caption_tokens.ptb(texts), "ptb"
        except Unavailable as error:
            if tokenizer == "ptb":
                raise UserError(f"tokenizer: 'ptb' cannot run, {error}; 'auto' can.") from error
            skipped["PTB"], tokenizer = str(error), "python"
    if tokenizer == "python":
        texts = caption_tokens.python(texts)
    words = (" ".join(text.split()) for text in texts)
    captions = {image: next(words) for image in captions}
    references = {image: [next(words) for _ in several] for image, several in references.items()}
    if not any(itertools.chain.from_iterable(references.values())):
        raise UserError("caption metrics: there is not one word in the references.")
    # The scorers go by order.
    return {image: references[image] for image in captions}, captions, _STAMPS[tokenizer]


# Each scorer takes references and captions of the same images in the same order, cut into words,
# and returns the figure and the scores of the images, once for each of its metrics.
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

    return [Cider().compute_score(references, _listed(captions))]


def _listed(captions: Captions) -> dict[Any, list[str]]:
    return {image: [caption] for image, caption in captions.items()}


def _meteor(references: References, captions: Captions) -> Found:
    """METEOR by the program that pycocoevalcap brings.

    Its own way of talking to the program waits for ever in its destructor once the program failed.
    """
    jar = package_folder() / "meteor" / "meteor-1.5.jar"
    program = ("-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm")
    with java(*program, images=len(captions)) as process:

        def ask(*parts: str) -> str:
            process.stdin.write(" ||| ".join(parts) + "\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        statistics = []
        for image, caption in captions.items():
            texts = (text.replace("|||", "") for text in (*references[image], caption))
            statistics.append(ask("SCORE", *texts))
        scores = [float(ask("EVAL", *statistics))]
        scores += [float(process.stdout.readline()) for _ in captions]
    *scores, total = scores
    return [(total, scores)]


def _spice(references: References, captions: Captions, when: str) -> Found:
    """SPICE by the program that pycocoevalcap brings, made for Java 8; later ones may refuse it."""
    if when == "no":
        raise Unavailable("not asked for")
    find_java()  # before anything is fetched for it
    folder = package_folder() / "spice"
    models = [folder / "lib" / f"stanford-corenlp-3.6.0{kind}.jar" for kind in ("", "-models")]
    if not all(path.exists() for path in models):
        if when == "installed":
            raise Unavailable(
                "its models are not installed, and nothing was fetched; spice=download would fetch "
                f"them, some 400 MB, from {MODELS_HOST}"
            )
        _fetch_spice_models()
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
                raise ValueError(f"it ended with {process.returncode}")
            results = json.loads(found.read_text(encoding="utf-8"))
            by_image = {item["image_id"]: float(item["scores"]["All"]["f"]) for item in results}
            scores = [by_image[k] for k in range(len(captions))]
    return [(sum(scores) / len(scores), scores)]


def _fetch_spice_models() -> None:
    from pycocoevalcap.spice.get_stanford_models import get_stanford_models

    try:
        with contextlib.redirect_stdout(sys.stderr):  # it shows its progress
            get_stanford_models()
    except (OSError, zipfile.BadZipFile) as error:
        raise Unavailable(f"its models could not be fetched ({error})") from error
