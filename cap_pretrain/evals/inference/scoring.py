"""Scores of texts for images, in batches.

Zero-shot classification, retrieval, composition and perplexity share this. A learner takes part if
it has `image_features`, `text_features` and `compare`:

    captioners     score by the log-likelihood of the text as a caption, in nats. It has a *prior*:
                   the log-likelihood of the text for a blank image, which is gray all over.
    dual encoders  (which have `embed_text`) score by cosine similarity. Without an image there is
                   nothing to compare a text with, so they have no prior.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cap_pretrain.data.sources.base import Source
from cap_pretrain.data.text.tokenizers import encode_answer
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Interrupted, ScoringOptions, data_parallel, round_up
from cap_pretrain.learners.protocols import EmbedsText, ScoresTexts
from cap_pretrain.models.sizes import STORED

# The gray of the blank image, in 0..255: the value that normalization brings closest to 0.
BLANK = 128

# Scores closer than this are equal: the same pair rounds differently in a batch of another shape
# (in float32 by some 1e-5 nats, or 1e-7 of a cosine).
CAPTIONER_TOLERANCE, DUAL_ENCODER_TOLERANCE = 1e-4, 1e-6

COSINES = 2**22  # Cosines computed at once: 16 MB of them. A log-likelihood needs far more memory.

# Text lengths are rounded up to a multiple of this, so that few different shapes are compiled.
LENGTHS = 8


class Told(NamedTuple):
    """What evaluators say of texts that tie: for `Result.details`, and for `Result.lines`."""

    counts: dict[str, int]
    lines: tuple[str, ...]


class Scoring:
    """Scores (image, text) pairs by a learner; the scores are on every host.

    Raises UserError if the learner does not score texts, nor a part of it.

    Attributes:
        has_prior: whether the learner is a captioner.
        tolerance: scores that differ by no more are equal.
        batch_size: images at a time, a multiple of the devices that share a batch.
        image_features: `(variables, images uint8 [B, H, W, 3] on the devices) -> features` for
            `compare`, compiled once for each B.
    """

    def __init__(self, context: Context, options: ScoringOptions):
        able = context.able(ScoresTexts, options.part)
        if able is None:
            raise UserError(
                f"evals: this evaluator scores texts for images, which a {context.kind.__name__} "
                "cannot; use a captioner or a dual encoder, or remove the evaluator."
            )
        context = able
        self.has_prior = not issubclass(context.kind, EmbedsText)
        self.tolerance = CAPTIONER_TOLERANCE if self.has_prior else DUAL_ENCODER_TOLERANCE
        self._context = context
        self.batch_size = round_up(options.batch_size, data_parallel(context.mesh))
        self._texts = max(1, (options.pairs if self.has_prior else COSINES) // self.batch_size)

        def image_features(variables, images):
            return context.merged(variables).image_features(images)

        # Image features are large and stay sharded; all other results go to every host.
        self.image_features = jax.jit(
            image_features, out_shardings=sharding.batch_sharding(context.mesh)
        )
        self._text_features = context.jit(lambda learner, text: learner.text_features(text))
        self._compare = context.jit(lambda learner, *features: learner.compare(*features))
        self._whole = context.jit(lambda _, arrays: arrays)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Return the tokens of texts, int32 [n, T]; for captioners T fits the longest of them."""
        return self._trim(np.stack([self._context.tokenizer.encode(text) for text in texts]))

    def encode_answers(
        self, questions: Sequence[str], answers: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens int32 [n, T], as `encode`, and how many the question has, int32 [n]."""
        pairs = zip(questions, answers, strict=True)
        rows, given = zip(*(encode_answer(self._context.tokenizer, *p) for p in pairs), strict=True)
        return self._trim(np.stack(rows)), np.array(given, np.int32)

    def _trim(self, tokens: np.ndarray) -> np.ndarray:
        """Drop columns that are padding in all rows, for captioners."""
        if not self.has_prior:
            return tokens  # the text encoder reads padding, too
        longest = int(np.max(np.sum(tokens != 0, axis=1)))
        return tokens[:, : round_up(longest, LENGTHS)]

    def batches(
        self, variables: Any, source: Source, limit: int
    ) -> Iterator[tuple[dict[str, np.ndarray], jax.Array]]:
        """Yield batches of images as (their identity, their features for `compare`).

        The identity is a dict of `index` and `label` int [B], and `mask` bool [B], which is False
        for padding and for images that cannot be decoded. Every host has it in whole. `limit` takes
        only the first so many images; 0 is all. Raises UserError, at the end, if no image could be
        decoded, and Interrupted if the run is stopping.
        """
        none_decoded = True
        for batch, _ in self._context.batches(source, self.batch_size, limit or None):
            features = self.image_features(variables, batch["image"])
            where = {name: batch[name] for name in ("index", "label", "mask")}
            where = jax.device_get(self._whole(variables, where))
            none_decoded &= not where["mask"].any()
            yield where, features
        if none_decoded:
            raise UserError(f"evals: {source} has no image that can be decoded.")

    def text_features(self, variables: Any, tokens: np.ndarray) -> np.ndarray:
        """Return the features [n, ...] for `compare` of texts int32 [n, T]."""
        if self.has_prior:
            return tokens
        parts = []
        for start in range(0, len(tokens), self.batch_size):
            part = _padded(tokens[start : start + self.batch_size], self.batch_size)
            parts.append(self._text_features(variables, self._put(part)))
        return np.concatenate(jax.device_get(parts))[: len(tokens)]

    def compare(
        self,
        variables: Any,
        images: jax.Array,
        texts: np.ndarray,
        prompts: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the scores of each image with each text, float32 [B, C].

        `images` are features [B, ...] of a batch; `texts` are features [C, ...] if all images have
        the same texts, else [B, C, ...]. For captioners, `prompts`, int32 [C] or [B, C], says how
        many leading tokens are given and not scored. Raises Interrupted if the run is stopping.
        """
        axis = texts.ndim - 2
        count = texts.shape[axis]
        # A power of two, so that few different shapes are compiled.
        size = min(self._texts, 2 ** (count - 1).bit_length())
        scores = []
        for start in range(0, count, size):
            if self._context.stop():
                raise Interrupted
            parts = [texts[..., start : start + size, :]]
            parts += [] if prompts is None else [prompts[..., start : start + size]]
            put = [self._put(_padded(part, size, axis)) for part in parts]
            scores.append(self._compare(variables, images, *put))
        return np.concatenate(jax.device_get(scores), axis=1)[:, :count]

    def check_prior(self) -> None:
        """Raise UserError if a captioner reads stored features, so that no image is blank."""
        if self.has_prior and self._context.config.model.name == STORED:
            raise UserError(
                "evals: this evaluator needs scores for a blank image, and the run reads stored "
                "features, not images; remove the evaluator."
            )

    def prior(self, variables: Any, tokens: np.ndarray) -> np.ndarray:
        """Return the scores float32 [n] of texts int32 [n, T] for the blank image."""
        self.check_prior()
        side = self._context.config.data.image_size
        rows = sharding.batch_rows(self._context.mesh, self.batch_size)
        blank = {"image": np.full((len(rows), side, side, 3), BLANK, np.uint8)}
        images = sharding.put_batch(blank, self._context.mesh)["image"]
        features = self.image_features(variables, images)
        columns = -(-len(tokens) // self.batch_size)
        own = _padded(tokens, columns * self.batch_size).reshape(self.batch_size, columns, -1)
        return self.compare(variables, features, own).reshape(-1)[: len(tokens)]

    def details(self, data: str, split: str) -> dict[str, str]:
        """Return what `Result.details` says of the scores and the dataset ("" is the run's own)."""
        part = self._context.part
        return self._context.named(split, data) | {
            **({"part": part} if part else {}),
            "score": "log-likelihood, nats" if self.has_prior else "cosine",
            "blank_image": f"grey, {BLANK} of 255" if self.has_prior else "none",
        }

    def told_apart(self, what: str, texts: Sequence[str], tokens: np.ndarray) -> "Told":
        """Count different texts that have the same tokens.

        They tie, whatever the learner: they are equal once cut at `text.length`, or differ only in
        what the tokenizer drops or does not know.

        Args:
            what: what the texts are, in the plural.
            texts: n texts, for the message.
            tokens: their tokens, int [n, ...].
        """
        groups: dict[bytes, dict[str, None]] = {}
        for text, row in zip(texts, tokens, strict=True):
            groups.setdefault(row.tobytes(), {})[text] = None
        alike = [list(group) for group in groups.values() if len(group) > 1]
        counts = {f"tied_{what}": sum(map(len, alike))}
        if not alike:
            return Told(counts, ())
        first, second = (text if len(text) <= 80 else text[:79] + "…" for text in alike[0][:2])
        line = (
            f"{sum(map(len, alike))} {what} tie, since others have the same tokens, such as "
            f"{first!r} and {second!r}; text.length is {self._context.config.text.length}"
        )
        return Told(counts, (line,))

    def _put(self, array: np.ndarray) -> jax.Array:
        """Send an array that is the same on every host to every device."""
        everywhere = sharding.replicated(self._context.mesh)
        # With several hosts, JAX takes this transfer for an implicit one.
        with jax.transfer_guard_host_to_device("allow"):
            return jax.make_array_from_process_local_data(everywhere, array)


def _padded(array: np.ndarray, size: int, axis: int = 0) -> np.ndarray:
    """Return the array with zeros appended along an axis, up to `size` entries."""
    width = [(0, 0)] * array.ndim
    width[axis] = (0, size - array.shape[axis])
    return np.pad(array, width)
