"""Retrieval: an image's captions among all captions, and a caption's image among all images."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from cap_pretrain.data.sources.base import without_image
from cap_pretrain.errors import UserError
from cap_pretrain.evals import examples
from cap_pretrain.evals.base import Context, Result, ScoringOptions
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.inference.scoring import Scoring, Told
from cap_pretrain.evals.metrics import ranking
from cap_pretrain.evals.retrieved import Found

TOP = (1, 5, 10)


class Retrieval:
    """R@1, R@5, R@10 and mean rank in both directions; ties count as random choices among the tied.

    From image to text, a hit is any of the image's captions; from text to image, the caption's own
    image. Captioners score by log-likelihood and, from image to text, also (`_over_prior`) by what
    the image adds to it: log p(caption | image) - log p(caption | blank image). Without that, short
    and common captions come first for every image.

    Scores are computed and counted block by block; the full matrix is never stored.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(ScoringOptions):
        """Settings; the dataset needs captions.

        The candidates are the first `limit` images with all of their captions; 0 is all, as in the
        usual protocols on COCO (5,000) and Flickr30k (1,000). Captioners run their decoder for
        every pair, so the time grows with the square of this.
        """

        limit: int = 1000

    def __init__(self, context: Context, options: Options):
        """Build the evaluator; raise UserError if no texts can be scored or there are none."""
        self._context, self._options = context, options
        self._scoring = Scoring(context, options)
        self._source = source = context.source(options.split, options.data)
        self._scoring.check_prior()
        self._count = min(len(source), options.limit or len(source))
        if not any(without_image(source, index)["captions"] for index in range(self._count)):
            raise UserError(
                f"evals: retrieval: {source} has no captions; name a captioned dataset or set "
                "data.fields.captions."
            )

    @functools.cached_property
    def _texts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, Told]:
        """The tokens of all captions, the image of each, the captions of each image (or -1)."""
        captions = [without_image(self._source, k)["captions"] for k in range(self._count)]
        texts = [caption for own in captions for caption in own]
        owner = np.repeat(np.arange(self._count), [len(own) for own in captions])
        own = np.full((self._count, max(map(len, captions))), -1)
        first = np.searchsorted(owner, owner)
        own[owner, np.arange(len(texts)) - first] = np.arange(len(texts))
        tokens = self._scoring.encode(texts)
        alike = [" ".join(text.casefold().split()) for text in texts]
        return tokens, owner, own, self._scoring.told_apart("captions", alike, tokens)

    def work(self) -> Work:
        """Return the work of an evaluation: captioners decode every caption for every image."""
        captions = len(without_image(self._source, 0)["captions"])

        def passes(images: int) -> float:
            pairs = 0.5 * images * images * captions if self._scoring.has_prior else 0.0
            return images * (1 + captions) + pairs

        return Work(self._count, passes)

    def __call__(self, variables: Any) -> Result:
        """Rank all candidates in both directions."""
        scoring, (tokens, owner, own_texts, ties) = self._scoring, self._texts
        texts = scoring.text_features(variables, tokens)
        prior = scoring.prior(variables, tokens) if scoring.has_prior else None

        # The images are read twice; a dual encoder's features, a small vector each, are kept.
        cache = None if scoring.has_prior else list(self._batches(variables))

        own_scores, present = np.zeros(len(texts), np.float32), np.zeros(len(texts), bool)
        for where, images in cache or self._batches(variables):
            own = own_texts[where["index"]]
            scores = scoring.compare(variables, images, texts[own])
            real = where["mask"][:, None] & (own >= 0)
            own_scores[own[real]], present[own[real]] = scores[real], True

        # Captions whose image cannot be decoded are not candidates.
        counts = Counts(owner[present], own_scores[present], scoring.tolerance)
        found = Found(np.flatnonzero(present), None if prior is None else prior[present])
        offsets = {"": 0.0} if prior is None else {"": 0.0, "_over_prior": prior[present]}
        for where, images in cache or self._batches(variables):
            scores = scoring.compare(variables, images, texts[present])
            counts.add(where["index"][where["mask"]], scores[where["mask"]], offsets)
            if self._context.workdir:
                found.add(where["index"][where["mask"]], scores[where["mask"]])
        shown = examples.attempted(self._context, lambda: found.exhibits(self._source, owner))
        details = self._details(counts) | ties.counts
        return Result(counts.metrics(), details, ties.lines, exhibits=shown)

    def _batches(self, variables) -> Iterable[tuple[dict[str, np.ndarray], Any]]:
        return self._scoring.batches(variables, self._source, self._options.limit)

    def _details(self, counts: "Counts") -> dict:
        return self._scoring.details(self._options.data, self._options.split) | {
            "protocol": f"candidates in the order of their scores; {ranking.TIES}",
            "images": counts.images,
            "captions": counts.captions,
        }


class Counts:
    """Counts which candidates score above the right ones, from rows of the score matrix.

    `owner`, int [M], is the image of each text, and `own_scores`, float32 [M], its score for that
    image; scores that differ by no more than `tolerance` are equal. `images` counts the images with
    captions so far, `captions` the M texts.
    """

    def __init__(self, owner: np.ndarray, own_scores: np.ndarray, tolerance: float):
        self._owner, self._own_scores, self._tolerance = owner, own_scores, tolerance
        self._by_text = np.zeros((2, len(owner)), int)  # better, tied
        self._by_image: dict[str, list[np.ndarray]] = {}  # suffix -> better, wrong tied, right tied
        self.images, self.captions = 0, len(owner)

    def add(self, index: np.ndarray, scores: np.ndarray, offsets: dict[str, Any]) -> None:
        """Count rows float32 [b, M] of the score matrix, of the images `index`, int [b].

        `offsets` maps suffixes of a metric to what is subtracted before ranking: [M] or a number.
        """
        wrong = index[:, None] != self._owner
        captioned = ~wrong.all(1)
        self.images += int(captioned.sum())
        outcome = ranking.compare(scores, self._own_scores, self._tolerance)
        self._by_text += [np.sum(where & wrong, axis=0) for where in outcome]
        for suffix, offset in offsets.items():
            adjusted = scores - offset
            best = np.max(np.where(wrong, -np.inf, adjusted), axis=1, keepdims=True)
            better, tied = ranking.compare(adjusted, best, self._tolerance)
            outcomes = [better & wrong, tied & wrong, tied & ~wrong]
            counts = np.stack([np.sum(where, axis=1) for where in outcomes])
            self._by_image.setdefault(suffix, []).append(counts[:, captioned])

    def metrics(self) -> dict[str, float]:
        """Return the metrics that `Retrieval` names; images without captions are left out."""
        metrics: dict[str, float] = {}
        for suffix, parts in self._by_image.items():
            metrics |= _metrics("image_to_text", suffix, *np.concatenate(parts, axis=1))
        return metrics | _metrics("text_to_image", "", *self._by_text)


def _metrics(direction: str, suffix: str, *counts: np.ndarray) -> dict[str, float]:
    """Return the metrics of one direction from the counts that `ranking` takes."""
    metrics = {f"r{k}": ranking.probability_in_top(k, *counts).mean() for k in TOP}
    metrics["mean_rank"] = ranking.expected_rank(*counts).mean()
    return {f"{direction}_{name}{suffix}": float(x) for name, x in metrics.items()}
