"""Scores of texts for images in batches, from any learner that gives them.

What zero-shot classification, retrieval and composition have in common. A learner takes part if it
has `image_features`, `text_features` and `compare`:

  captioners     give the log-likelihood of the text as a caption, in nats. It has a *prior*: what
                 the same decoder gives the text for a blank image, which is grey all over.
  dual encoders  (which have `embed_text`) give the cosine. Without an image there is nothing to
                 compare a text with: they have no prior.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from cap_pretrain.data.sources.base import Source
from cap_pretrain.data.text.tokenizers import encode_answer
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Interrupted
from cap_pretrain.learners.protocols import EmbedsText, ScoresTexts, learner_type
from cap_pretrain.models.sizes import STORED

# The grey of the blank image, of 0 to 255: as near to 0 as what the encoder reads can come.
BLANK = 128

# Scores this near to each other are equal: in a batch of another shape, the same text for the same
# image rounds otherwise (in float32 by some 1e-5 nats, or 1e-7 of a cosine).
CAPTIONER_TOLERANCE, DUAL_ENCODER_TOLERANCE = 1e-4, 1e-6

# Cosines computed at once: 16 MB of them. Log-likelihoods need far more memory a piece.
COSINES = 2**22

# Lengths of texts are rounded up to this, so that few different ones are compiled.
LENGTHS = 8


class Scoring:
    """A learner's scores of (image, text) pairs, the same on every host.

    Args:
      context: what evaluators work with.
      batch_size: images a batch.
      pairs: (image, text) pairs that a captioner scores at once.

    Attributes:
      has_prior: whether the learner is a captioner.
      tolerance: scores that differ by no more are equal.

    Raises:
      UserError: the learner does not score texts for images.
    """

    def __init__(self, context: Context, *, batch_size: int, pairs: int):
        learner = learner_type(context.graphdef)
        if not issubclass(learner, ScoresTexts):
            raise UserError(
                "evals: this evaluator scores texts for images, which a learner of the kind "
                f"{learner.__name__} does not; take a captioner or a dual encoder, or leave it out."
            )
        self.has_prior = not issubclass(learner, EmbedsText)
        self.tolerance = CAPTIONER_TOLERANCE if self.has_prior else DUAL_ENCODER_TOLERANCE
        self._context = context
        ways = context.mesh.shape["data"] * context.mesh.shape["fsdp"]
        self._images = -(-batch_size // ways) * ways
        self._texts = max(1, (pairs if self.has_prior else COSINES) // self._images)

        def image_features(variables, images):
            return nnx.merge(context.graphdef, *variables).image_features(images)

        # They are large and stay where they were made; whatever else there is goes to every host.
        self._image_features = jax.jit(
            image_features, out_shardings=sharding.batch_sharding(context.mesh)
        )
        self._text_features = context.jit(lambda learner, text: learner.text_features(text))
        self._compare = context.jit(lambda learner, *features: learner.compare(*features))
        self._whole = context.jit(lambda _, arrays: arrays)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the texts as int32 [n, T], for captioners no longer than the longest of them."""
        return self._cut(np.stack([self._context.tokenizer.encode(text) for text in texts]))

    def encode_answers(
        self, questions: Sequence[str], answers: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `encode`, with the question before each answer, and int32 [n], how long that is."""
        pairs = zip(questions, answers, strict=True)
        rows, given = zip(*(encode_answer(self._context.tokenizer, *p) for p in pairs), strict=True)
        return self._cut(np.stack(rows)), np.array(given, np.int32)

    def _cut(self, tokens: np.ndarray) -> np.ndarray:
        if not self.has_prior:
            return tokens  # whose encoder reads padding, too
        longest = int(np.max(np.sum(tokens != 0, axis=1)))
        return tokens[:, : -(-longest // LENGTHS) * LENGTHS]

    def batches(
        self, variables: Any, source: Source, limit: int
    ) -> Iterator[tuple[dict[str, np.ndarray], jax.Array]]:
        """Yields batches of images, each as where it comes from and features for `compare`.

        The former is whole on every host: `index` and `label` int [B], and `mask` bool [B], False
        for padding and for images that do not decode. With a limit (not 0), stops after so many.

        Raises:
          UserError: at the end, if no image decoded.
        """
        none = True
        for batch, _ in self._context.batches(source, self._images, limit or None):
            features = self._image_features(variables, batch["image"])
            where = {name: batch[name] for name in ("index", "label", "mask")}
            where = jax.device_get(self._whole(variables, where))
            none &= not where["mask"].any()
            yield where, features
        if none:
            raise UserError(f"evals: {source} has no image that can be decoded.")

    def text_features(self, variables: Any, tokens: np.ndarray) -> np.ndarray:
        """tokens int32 [n, T] -> what `compare` wants of them, [n, ...]."""
        if self.has_prior:
            return tokens
        parts = []
        for start in range(0, len(tokens), self._images):
            part = _padded(tokens[start : start + self._images], self._images)
            parts.append(self._text_features(variables, self._put(part)))
        return np.concatenate(jax.device_get(parts))[: len(tokens)]

    def compare(
        self,
        variables: Any,
        images: jax.Array,
        texts: np.ndarray,
        prompts: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns the scores float32 [B, C].

        Args:
          variables: of the learner.
          images: features [B, ...] of a batch.
          texts: features [C, ...], the same texts for each image, or [B, C, ...], its own.
          prompts: int32 [C] or [B, C], for captioners: the leading tokens that are given.

        Raises:
          Interrupted: the run is to stop.
        """
        axis = texts.ndim - 2
        count = texts.shape[axis]
        # Powers of two, so that few different numbers of texts are compiled.
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

    def prior(self, variables: Any, tokens: np.ndarray) -> np.ndarray:
        """The scores [n] of texts int32 [n, T] for the blank image.

        Raises:
          UserError: the run reads stored features.
        """
        if self._context.config.model.name == STORED:
            raise UserError(
                "evals: what a text scores without an image is that for a blank one, and the run "
                "reads stored features; leave out what compares with it."
            )
        side = self._context.config.data.image_size
        rows = sharding.batch_rows(self._context.mesh, self._images)
        blank = {"image": np.full((len(rows), side, side, 3), BLANK, np.uint8)}
        images = sharding.put_batch(blank, self._context.mesh)["image"]
        features = self._image_features(variables, images)
        columns = -(-len(tokens) // self._images)
        own = _padded(tokens, columns * self._images).reshape(self._images, columns, -1)
        return self.compare(variables, features, own).reshape(-1)[: len(tokens)]

    def details(self, data: str, split: str) -> dict[str, str]:
        """What a result says of its data (options; "" is the run's own) and of the scores."""
        return self._context.named(split, data) | {
            "score": "log-likelihood, nats" if self.has_prior else "cosine",
            "blank_image": f"grey, {BLANK} of 255" if self.has_prior else "none",
        }

    def _put(self, array: np.ndarray) -> jax.Array:
        """Sends what is the same on every host to every device."""
        everywhere = sharding.replicated(self._context.mesh)
        # With several hosts, JAX does not see that this transfer is meant.
        with jax.transfer_guard_host_to_device("allow"):
            return jax.make_array_from_process_local_data(everywhere, array)


def _padded(array: np.ndarray, size: int, axis: int = 0) -> np.ndarray:
    """The array with `size` entries along an axis, zeros at its end."""
    width = [(0, 0)] * array.ndim
    width[axis] = (0, size - array.shape[axis])
    return np.pad(array, width)
