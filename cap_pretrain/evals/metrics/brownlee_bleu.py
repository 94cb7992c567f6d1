"""BLEU as in the public code that the recipe `merge` follows, for comparison with its results only.

The code is demidovd98/image_captioning_with_SSL, after J. Brownlee's tutorial. Its scores are too
high: every caption and reference is enclosed in two marker words, which match; words of one letter
("a") are dropped; and BLEU-3 weights its three precisions by .3 each, .9 in total, which exceeds
their geometric mean.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cap_pretrain.data.text.words import Rules

START, END = "startseq", "endseq"
WEIGHT_3 = 0.3

_RULES = Rules(tokenization="simple", drop_letters=True)


def cut(text: str) -> str:
    """Return text in lower case without punctuation and one-letter words, between the markers."""
    return " ".join([START, *_RULES.words(text.lower()), END])


def bleu(
    references: Mapping[Any, Sequence[str]], captions: Mapping[Any, str]
) -> list[tuple[float, Sequence[float]]]:
    """Return BLEU-1 to BLEU-4 as (over all images, for each image), of texts from `cut`.

    Precisions, clipping and the brevity penalty, with the closest reference length, are those of
    corpus BLEU; only the weights of BLEU-3 differ.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for image, caption in captions.items():
        scorer += (caption, references[image])
    totals, scores = scorer.compute_score(option="closest")
    brevity = min(1.0, math.exp(1 - scorer.reflen() / max(scorer.testlen(), 1)))
    totals[2] = brevity * (totals[2] / brevity) ** (3 * WEIGHT_3)
    return list(zip(totals, scores, strict=True))
