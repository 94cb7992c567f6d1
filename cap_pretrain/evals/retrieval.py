"""Retrieval: the captions of an image among all captions, and the image of a caption among all."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.evals.metrics import ranking
from cap_pretrain.evals.scoring import Scoring

TOP = (1, 5, 10)


class Retrieval:
    """R@1, R@5, R@10 and mean rank in both directions; ties count as guessing among the tied.

    Image to text: whether any of the image's captions is among the first; text to image: whether
    the caption's own image is. Captioners score by log-likelihood, and from image to text also
    (`_over_prior`) by how much the image adds to it: log p(caption | image) - log p(caption | blank
    image), without which short and common captions come first for every image.

    The scores are computed block by block and counted at once: the matrix is never kept.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings.

        Attributes:
          data: dataset with captions; "" is the run's own.
          split: "" is `data.eval_split`.
          limit: the first so many images, with all of their captions, are the candidates; 0 is all,
            as the usual protocols on COCO (5,000) and Flickr30k (1,000) want. Captioners run their
            decoder for every image with every caption, so ten times as many take a hundred times
            as long.
          batch_size: images a batch.
          pairs: (image, caption) pairs that a captioner scores at once.
        """

        data: str = ""
        split: str = ""
        limit: int = 1000
        batch_size: int = 64
        pairs: int = 512

    def __init__(self, context: Context, options: Options):
        self._context, self._options = context, options
        self._scoring = Scoring(context, batch_size=options.batch_size, pairs=options.pairs)
        self._source = source = context.source(options.split, options.data)
        count = min(len(source), options.limit or len(source))
        captions = [source[index]["captions"] for index in range(count)]
        texts = [caption for own in captions for caption in own]
        if not texts:
            raise UserError(
                f"evals: retrieval: {source} has no captions; name a captioned dataset or set "
                "data.fields.captions."
            )
        self._tokens = self._scoring.encode(texts)
        # The image of each caption, and the captions of each image, -1 where it has no more.
        self._owner = np.repeat(np.arange(count), [len(own) for own in captions])
        self._own = np.full((count, max(map(len, captions))), -1)
        first = np.searchsorted(self._owner, self._owner)
        self._own[self._owner, np.arange(len(texts)) - first] = np.arange(len(texts))

    def __call__(self, variables) -> Result:
        scoring = self._scoring
        texts = scoring.text_features(variables, self._tokens)
        prior = scoring.prior(variables, self._tokens) if scoring.has_prior else None

        def blocks() -> Iterable[tuple[dict[str, np.ndarray], Any]]:
            return scoring.batches(variables, self._source, self._options.limit)

        if not scoring.has_prior:  # one small vector an image, to be kept
            kept = list(blocks())
            blocks = lambda: kept

        own_scores, there = np.zeros(len(texts), np.float32), np.zeros(len(texts), bool)
        for where, images in blocks():
            own = self._own[where["index"]]
            scores = scoring.compare(variables, images, texts[own])
            real = where["mask"][:, None] & (own >= 0)
            own_scores[own[real]], there[own[real]] = scores[real], True

        # Captions whose image does not decode are no candidates.
        counts = Counts(self._owner[there], own_scores[there], scoring.tolerance)
        offsets = {"": 0.0} if prior is None else {"": 0.0, "_over_prior": prior[there]}
        for where, images in blocks():
            scores = scoring.compare(variables, images, texts[there])
            counts.add(where["index"][where["mask"]], scores[where["mask"]], offsets)
        return Result(counts.figures(), self._details(counts))

    def _details(self, counts: "Counts") -> dict:
        return self._scoring.details(self._options.data, self._options.split) | {
            "protocol": f"candidates in the order of their scores; {ranking.TIES}",
            "images": counts.images,
            "captions": counts.captions,
        }


class Counts:
    """Counts who scores above the right candidates, as rows of the score matrix come in.

    Args:
      owner: int [M], the image of each text.
      own_scores: float32 [M], the score of each text for its image.
      tolerance: scores that differ by no more are equal.
    """

    def __init__(self, owner: np.ndarray, own_scores: np.ndarray, tolerance: float):
        self._owner, self._own_scores, self._tolerance = owner, own_scores, tolerance
        self._by_text = np.zeros((2, len(owner)), int)  # better, tied
        self._by_image: dict[str, list[np.ndarray]] = {}  # suffix -> better, wrong tied, right tied
        self.images, self.captions = 0, len(owner)

    def add(self, index: np.ndarray, scores: np.ndarray, offsets: dict[str, Any]) -> None:
        """Counts rows of the matrix.

        Args:
          index: int [b], which images they are of.
          scores: float32 [b, M].
          offsets: suffix of a figure -> what is taken off, [M] or a number, before rows are ranked.
        """
        wrong = index[:, None] != self._owner
        captioned = ~wrong.all(1)
        self.images += int(captioned.sum())
        outcome = ranking.compare(scores, self._own_scores, self._tolerance)
        self._by_text += [np.sum(where & wrong, axis=0) for where in outcome]
        for suffix, offset in offsets.items():
            left = scores - offset
            best = np.max(np.where(wrong, -np.inf, left), axis=1, keepdims=True)
            better, tied = ranking.compare(left, best, self._tolerance)
            counted = [better & wrong, tied & wrong, tied & ~wrong]
            counted = np.stack([np.sum(where, axis=1) for where in counted])
            self._by_image.setdefault(suffix, []).append(counted[:, captioned])

    def figures(self) -> dict[str, float]:
        """As `Retrieval` says, images without captions left out."""
        figures = {}
        for suffix, parts in self._by_image.items():
            figures |= _figures("image_to_text", suffix, *np.concatenate(parts, axis=1))
        return figures | _figures("text_to_image", "", *self._by_text)


def _figures(direction: str, suffix: str, *standing: np.ndarray) -> dict[str, float]:
    figures = {f"r{k}": ranking.share_in_top(k, *standing).mean() for k in TOP}
    figures["mean_rank"] = ranking.expected_rank(*standing).mean()
    return {f"{direction}_{name}{suffix}": float(x) for name, x in figures.items()}
