"""Learners without weights, and datasets on which their exact scores are known.

Image k of `Pictures` is filled with the gray level k. Captions are lists of numbers, such as "7 2",
a true caption of image 7.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cap_pretrain import inputs
from cap_pretrain.distributed import sharding
from cap_pretrain.evals.base import Context
from cap_pretrain.training import step
from tests import tiny, toy


class Numbers:
    """A tokenizer of numbers: the token of number n is n + 2, and 1 ends a text."""

    pad_id, eos_id, max_len = 0, 1, 8

    def encode(self, text: str) -> np.ndarray:
        ids = [int(word) + 2 for word in text.split()][: self.max_len - 1] + [1]
        return np.pad(np.array(ids, np.int32), (0, self.max_len - len(ids)))


class Oracle(nnx.Module):
    """Scores 1 for texts that begin with the image's number and 0 for all others."""

    def embed_text(self):
        """Marks it as a dual encoder for evaluators, without a prior."""

    def image_features(self, images):
        return jax.nn.one_hot(images[:, 0, 0, 0], 32)

    def text_features(self, text):
        return jax.nn.one_hot(text[..., 0] - 2, 32)

    def compare(self, images, texts):
        return jnp.einsum("bd,cd->bc" if texts.ndim == 2 else "bd,bcd->bc", images, texts)


class Constant(Oracle):
    """Scores all pairs the same."""

    def compare(self, images, texts):
        return 0 * super().compare(images, texts)


class Diverged(Oracle):
    """Scores NaN."""

    def compare(self, images, texts):
        return jnp.nan * super().compare(images, texts)


class Hashed(Oracle):
    """Scores quarters that depend on the image and the whole text: many ties, no right answer."""

    def image_features(self, images):
        return images[:, 0, 0, :1].astype(jnp.int32)

    def text_features(self, text):
        return jnp.sum(text * jnp.arange(1, text.shape[-1] + 1), -1, keepdims=True)

    def compare(self, images, texts):
        texts = texts[..., 0]
        return jnp.float32((images * 5 + images * texts * 7 + texts) % 11 // 2) / 4


class Pictures:
    """Gray images with given captions and labels; the images in `broken` cannot be decoded."""

    def __init__(self, captions=None, labels=None, classes=(), broken=()):
        self.class_names = list(classes)
        self._captions, self._labels, self._broken = captions, labels, broken

    def __str__(self):
        return "pictures"

    def __len__(self):
        return len(self._captions or self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = np.full((tiny.SIDE, tiny.SIDE, 3), index, np.uint8)
        return {
            "image": b"broken" if index in self._broken else image,
            "captions": self._captions[index] if self._captions else [],
            "label": self._labels[index] if self._labels else -1,
            "id": str(index),
        }


@dataclasses.dataclass(frozen=True)
class On(Context):
    """A context with one dataset, `pictures`."""

    pictures: Any = None

    def source(self, split: str = "", data: str = ""):
        return self.pictures


def context(learner: type[nnx.Module], pictures: Any) -> tuple[Context, tuple[Any, Any]]:
    """Return a context for a learner of this file, and its variables, of which there are none."""
    c = tiny.config()
    graphdef, *variables = step.split_learner(learner())
    mesh = sharding.make_mesh(c)
    return On(c, graphdef, Numbers(), mesh, pictures=pictures), tuple(variables)


def small(kind: str, tokenizer_path: Any, **fields: Any) -> tuple[Context, tuple[Any, Any]]:
    """Return a context and variables of a one-layer learner, for 13 images of `scenes`.

    All of its scores differ.
    """
    c = toy.config(kind, **dict(model__depth=1, data__scenes__length_val=13) | fields)
    tokenizer = inputs.open_tokenizer(c, tokenizer_path)
    graphdef, *variables = tiny.split(c, vocab=tokenizer.vocab_size)
    return Context(c, graphdef, tokenizer, sharding.make_mesh(c)), tuple(variables)
