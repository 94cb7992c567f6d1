"""BLEU as the public code of the recipe `merge` has it, to compare with its figures and no others.

That is demidovd98/image_captioning_with_SSL, after J. Brownlee's tutorial. It inflates: every
caption and reference is put between two marker words, which match; words of one letter ("a") are
dropped; and BLEU-3 weighs its three precisions by .3 each, .9 in all, which gives more than their
geometric mean.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cap_pretrain.data.text.words import Rules

START, END = "startseq", "endseq"
WEIGHT_3 = 0.3

_RULES = Rules(tokenization="simple", drop_letters=True)


def cut(text: str) -> str:
    """Lower case, without punctuation and words of one letter, between the markers."""
    return " ".join([START, *_RULES.words(text.lower()), END])


def bleu(
    references: Mapping[Any, Sequence[str]], captions: Mapping[Any, str]
) -> list[tuple[float, Sequence[float]]]:
    """BLEU-1 to 4 of text that was `cut`: of all images, and of each.

    Precisions, clipping and the penalty of the closest reference's length are those of any corpus
    BLEU; only the weights of BLEU-3 differ.
    """
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for image, caption in captions.items():
        scorer += (caption, references[image])
    totals, scores = scorer.compute_score(option="closest")
    brevity = min(1.0, math.exp(1 - scorer.reflen() / max(scorer.testlen(), 1)))
    totals[2] = brevity * (totals[2] / brevity) ** (3 * WEIGHT_3)
    return list(zip(totals, scores, strict=True))
