"""What a learner can do besides train: the methods that evaluators and tools look for.

Each protocol is tested on the learner's class, before anything is built or compiled:

    issubclass(learner_type(graphdef), WritesCaptions)

A learner takes part by having the methods; it does not inherit from the protocol.
"""

from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx


def learner_type(graphdef: nnx.GraphDef) -> type[nnx.Module]:
    """Return the class of the learner that `graphdef` describes."""
    root: Any = graphdef.nodes[0]
    return root.type


@runtime_checkable
class Encodes(Protocol):
    """Encodes images, as parts of joint learners do."""

    def encode(self, images: jax.Array) -> Any:
        """Return the encoder's output, `models.layers.EncoderOutput`, for uint8 [B, H, W, 3]."""


@runtime_checkable
class WritesCaptions(Protocol):
    """Writes captions of images token by token; see `models.decoding`."""

    def init_decoding(self, images: jax.Array, beams: int = 1) -> Any:
        """Encode uint8 images [B, H, W, 3] and return the decoding cache."""

    def decode_step(
        self, tokens: jax.Array, position: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        """Read tokens int32 [B * beams]; return the next logits [B * beams, V] and the cache."""


@runtime_checkable
class ScoresTexts(Protocol):
    """Scores how well texts match images; see `evals.scoring`."""

    def image_features(self, images: jax.Array) -> jax.Array:
        """Encode uint8 images [B, H, W, 3] as `compare` reads them."""

    def text_features(self, text: jax.Array) -> jax.Array:
        """Encode text int32 [..., T] as `compare` reads it."""

    def compare(self, images: jax.Array, texts: jax.Array) -> jax.Array:
        """Return the scores float32 [B, C] of C texts for each image."""


@runtime_checkable
class Locates(Protocol):
    """Finds what a text refers to in an image."""

    def locate(self, images: jax.Array, text: jax.Array) -> jax.Array:
        """Return a box float32 [B, 4] for each text int32 [B, T]; see `data.regions`."""


@runtime_checkable
class EmbedsText(Protocol):
    """Embeds a text without an image, as dual encoders do."""

    def embed_text(self, text: jax.Array) -> jax.Array:
        """Embed text int32 [B, T] as unit vectors float32 [B, D]."""


@runtime_checkable
class Attends(Protocol):
    """Attends to parts of the image for each token of a caption.

    Learners with one attention per decoder layer take a further argument `layer`.
    """

    def attend(self, images: jax.Array, text: jax.Array) -> jax.Array:
        """Return attention weights float32 [B, T, N] over the N parts of each image."""


@runtime_checkable
class Classifies(Protocol):
    """Assigns images to classes."""

    def classify(self, images: jax.Array) -> jax.Array:
        """Return logits float32 [B, classes] for uint8 images [B, H, W, 3]."""


@runtime_checkable
class Colorizes(Protocol):
    """Predicts the colors of gray images."""

    def colourize(self, images: jax.Array) -> jax.Array:
        """Keep the lightness of uint8 images [B, S, S, 3] and replace their colors."""


@runtime_checkable
class Illustrates(Protocol):
    """Shows in images what it predicts, for people to look at; see `evals.examples`."""

    @staticmethod
    def panel_names() -> tuple[str, ...]:
        """Return what each image of `illustrate` is."""

    def illustrate(
        self, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        """Return images uint8 [B, H, W, 3] of each kind, and which examples are right, bool [B].

        None in place of the latter means that right and wrong is not the question.
        """


@runtime_checkable
class Featurizes(Protocol):
    """Computes one vector per image by layers behind the encoder; see tools/extract_features.py."""

    def features(self, images: jax.Array) -> jax.Array:
        """Return vectors float32 [B, D] for uint8 images [B, H, W, 3]."""


@runtime_checkable
class Contrasts(Protocol):
    """Compares the examples of a whole batch in its loss; see `contrastive.Contrastive`."""

    def embed(self, batch: dict[str, jax.Array], key: jax.Array, train: bool) -> Any:
        """Embed each example: a tree of arrays [B, ...]."""

    def contrast(self, embedded: Any) -> tuple[jax.Array, dict[str, Any]]:
        """Return the loss, and metrics, of the embeddings of the whole batch."""
