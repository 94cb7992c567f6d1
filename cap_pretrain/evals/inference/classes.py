"""Scores of classes for images, from captions that contain the names of the classes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cap_pretrain.evals.inference.scoring import Scoring, Told

# A few plain templates after those of CLIP (Radford et al. 2021, section 3.1.4).
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a {} in a photo.",
    "a {}.",
)

Rules = Callable[[np.ndarray], dict[str, np.ndarray]]
"""Maps scores of captions to scores of classes, by the suffix of the rule."""


class ClassCaptions:
    """The captions of classes, one for each template, and how they score a class.

    Dual encoders compare the image with the normalized mean of the captions' unit vectors (CLIP's
    prompt ensemble), the rule "". Captioners have three rules, each a mean over the templates:

        (no suffix)   log p(caption | image)
        _over_prior   log p(caption | image) - log p(caption | blank image): what the image adds
        _per_token    log p(caption | image) / number of tokens
    """

    def __init__(self, scoring: Scoring, classes: Sequence[str], templates: Sequence[str]):
        self._scoring, self._classes, self._templates = scoring, classes, templates

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """Tokens of the captions of all classes, int32 [classes x templates, T]."""
        texts = [
            template.replace("{}", name) for name in self._classes for template in self._templates
        ]
        return self._scoring.encode(texts)

    @functools.cached_property
    def told(self) -> Told:
        """What is said of classes that have the same captions, or whose names are equal."""
        names = [f"{name} ({k})" for k, name in enumerate(self._classes)]
        tokens = self.tokens.reshape(len(self._classes), -1)
        return self._scoring.told_apart("classes", names, tokens)

    def prepared(self, variables: Any) -> tuple[np.ndarray, Rules]:
        """Return the texts for `Scoring.compare`, and a function from its result [n, …].

        That function returns the scores of the classes [n, K] by the suffix of the rule.
        """
        shape = (len(self._classes), len(self._templates))
        if not self._scoring.has_prior:
            vectors = self._scoring.text_features(variables, self.tokens)
            return ensemble(vectors.reshape(*shape, -1)), lambda scores: {"": scores}
        prior = self._scoring.prior(variables, self.tokens)
        lengths = np.sum(self.tokens != 0, axis=1)

        def rules(scores: np.ndarray) -> dict[str, np.ndarray]:
            rules = {"": scores, "_over_prior": scores - prior, "_per_token": scores / lengths}
            return {k: x.reshape(len(scores), *shape).mean(2) for k, x in rules.items()}

        return self.tokens, rules


def ensemble(vectors: np.ndarray) -> np.ndarray:
    """Return the normalized means [K, D] float32 of unit vectors [K, templates, D]."""
    mean = vectors.astype(np.float64).mean(1)
    return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)
