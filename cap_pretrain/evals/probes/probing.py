"""What probes have in common: features of two splits, and what their settings are chosen by."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cap_pretrain.data.sources import subset
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context
from cap_pretrain.evals.probes.features import Features, Labelled
from cap_pretrain.evals.zero_shot import accuracies

HELD_OUT = 0.1
"""Share of the training split that settings are chosen by if there is no split for that."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of every probe.

    Attributes:
      data: dataset with labels; "" is the run's own.
      train_split: what is learned from; "" is `data.split`.
      split: what is reported; "" is `data.eval_split`.
      layer: of the encoder: pooled, tokens (their mean), or one by its name, as block_6; or pixels,
        for what can be told without an encoder.
      train_limit, limit: at most so many images of either split, drawn at random; 0 is all.
      seed: of everything drawn.
      batch_size: images a batch as they are encoded; changes no figure.
    """

    data: str = ""
    train_split: str = ""
    split: str = ""
    layer: str = "pooled"
    train_limit: int = 0
    limit: int = 0
    seed: int = 0
    batch_size: int = 256


class Data(NamedTuple):
    """What a probe works with.

    Attributes:
      train: to learn from, and to choose settings by.
      choose: bool [N], the rows of `train` that settings are chosen by; fitted are then the others
        of `final`.
      final: bool [N], the rows that are fitted in the end.
      test: to report.
      classes: number of classes.
    """

    train: Labelled
    choose: np.ndarray
    final: np.ndarray
    test: Labelled
    classes: int


class Splits:
    """The features that a probe works with.

    Args:
      context: what evaluators work with.
      options: the probe's.
      validation: the split that settings are chosen by; "" holds out HELD_OUT of every class of the
        training split; None: nothing is chosen.

    Raises:
      UserError: a dataset or split that is missing, or has no labels.
    """

    def __init__(self, context: Context, options: Options, validation: str | None = None):
        self._options, self._validation = options, validation
        self._named = context.named(options.split, options.data)
        self._names = {
            "train": options.train_split or context.config.data.split,
            "test": self._named["split"],
        }
        if validation:
            self._names["validation"] = validation
        self._features, self._class_names = {}, []
        for part, split in self._names.items():
            source = context.source(split, options.data)
            self._class_names = source.class_names or self._class_names
            limit = options.limit if part == "test" else options.train_limit
            source = subset.sample(source, limit, options.seed)
            self._features[part] = Features(
                context, source, layer=options.layer, batch_size=options.batch_size
            )

    def __call__(self, variables: Any) -> Data:
        """Returns the features that these weights give.

        Raises:
          UserError: there is one class only; besides as `Features`.
        """
        found = {part: features(variables) for part, features in self._features.items()}
        train, test = found["train"], found["test"]
        choose = np.zeros(len(train.labels), bool)
        if self._validation == "":
            choose[held_out(train.labels, self._options.seed)] = True
        final = np.ones(len(train.labels), bool)
        if self._validation:
            more = found["validation"]
            train = Labelled(*(np.concatenate(both) for both in zip(train, more, strict=True)))
            choose = np.arange(len(train.labels)) >= len(final)
            final = ~choose
        classes = 1 + max(int(part.labels.max()) for part in found.values())
        classes = max(classes, len(self._class_names))
        if classes < 2:
            raise UserError("evals: a probe needs two classes or more; this dataset has one.")
        return Data(train, choose, final, test, classes)

    def details(self, data: Data, protocol: str) -> dict[str, Any]:
        """What a result says of how it came about."""
        return {
            "protocol": protocol,
            **self._named,
            "train_split": self._names["train"],
            "chosen_on": self._validation
            or (f"{HELD_OUT:.0%} of train" if self._validation == "" else None),
            "layer": self._options.layer,
            "dimensions": data.train.features.shape[1],
            "classes": data.classes,
            "train_images": int(data.final.sum()),
            "chosen_on_images": int(data.choose.sum()),
            "images": len(data.test.labels),
        }


def held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Returns the indices of HELD_OUT of every class, to choose settings by.

    Raises:
      UserError: that is none.
    """
    rows = subset.per_class(labels, lambda count: int(HELD_OUT * count + 0.5), seed)
    if not len(rows):
        raise UserError(
            f"evals: {len(labels)} training images are too few to hold out {HELD_OUT:.0%} of every "
            "class and choose settings by them; name a split for that (validation_split)."
        )
    return rows


@jax.jit
def standing(scores: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many classes score higher than the right one, and how many others the same.

    What is not a number counts as higher, so that a classifier that has diverged is never right.

    scores [N, K], labels [N] -> int32 [N] each.
    """
    own = jnp.take_along_axis(scores, labels[:, None], axis=1)
    tied = jnp.sum(scores == own, axis=1) - 1
    return jnp.sum(~(scores <= own), axis=1), jnp.maximum(tied, 0)


def figures(
    scores: jax.Array, labels: jax.Array, rows: np.ndarray | slice = slice(None)
) -> dict[str, float]:
    """Top-1, top-5 and the mean over classes of top-1, of some rows of scores [N, K]."""
    better, tied, labels = jax.device_get((*standing(scores, labels), labels))
    return accuracies(better[rows], tied[rows], labels[rows])
