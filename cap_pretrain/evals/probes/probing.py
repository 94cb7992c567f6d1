"""What probes share: their options, the features of their splits, and the held-out images."""

import collections
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from cap_pretrain import inputs
from cap_pretrain.data.sources import subset
from cap_pretrain.data.sources.base import Source, without_image
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, DataOptions
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.probes.features import Features, Labelled

HELD_OUT = 0.1
"""Fraction of the training split to choose settings on if there is no validation split."""

LEAST_PROBED = 2000
"""Images that are encoded in a short run: with few in each class a probe cannot be fitted."""

TOO_FEW = (
    f"evals: {{}} training images are too few to hold out {HELD_OUT:.0%} of every class; set "
    "validation_split to a split to choose settings on."
)
ONE_CLASS = "evals: a probe needs two classes or more; this dataset has one."


@dataclasses.dataclass(frozen=True)
class Options(DataOptions):
    """Settings of every probe; the dataset needs labels, and `split` is the test split.

    Attributes:
        train_split: the split to train on; "" is `data.split`.
        layer: of the encoder: pooled, tokens (their mean), or the name of a layer, as block_6; or
            pixels, a baseline without an encoder.
        train_limit: at most so many training images, drawn at random; 0 is all.
        limit: at most so many test images, drawn at random; 0 is all.
        seed: of all random draws.
        batch_size: images encoded at once; does not affect the metrics.
    """

    train_split: str = ""
    layer: str = "pooled"
    train_limit: int = 0
    limit: int = 0
    seed: int = 0
    batch_size: int = 256


class Data(NamedTuple):
    """The features that a probe is fitted to and tested on.

    Settings are chosen on the rows `choose`, bool [N], of the N training images, after fitting to
    the other rows of `final`, bool [N]; the final probe is fitted to all rows of `final`.
    """

    train: Labelled
    choose: np.ndarray
    final: np.ndarray
    test: Labelled
    classes: int


class Splits:
    """Computes the features of a probe's splits.

    `validation` is the split to choose settings on; "" holds out HELD_OUT of every class of the
    training split; None: nothing is chosen. Raises UserError if a dataset or split is missing or
    has no labels.

    `reader` is the class that computes features.

    Attributes:
        sources: the images of train, test and validation, as far as there are these parts.
        features: what computes the features of each part.
    """

    def __init__(
        self,
        context: Context,
        options: Options,
        validation: str | None = None,
        reader: type[Features] = Features,
    ):
        self._options, self._validation = options, validation
        self._named = context.named(options.split, options.data)
        self._names = {
            "train": options.train_split or context.config.data.split,
            "test": self._named["split"],
        }
        if validation:
            self._names["validation"] = validation
        self.features: dict[str, Features] = {}
        self.sources: dict[str, Source] = {}
        self._class_names: list[str] = []
        for part, split in self._names.items():
            source = context.source(split, options.data)
            self._class_names = source.class_names or self._class_names
            if (
                part == "test"
                and bool(getattr(source, "note", None))
                and split == inputs.VALIDATION
            ):
                self._check_apart()
            limit = options.limit if part == "test" else options.train_limit
            source = subset.sample(source, limit, options.seed)
            self.sources[part] = source
            self.features[part] = reader(
                context, source, layer=options.layer, batch_size=options.batch_size
            )
            if part == "train" and validation == "":
                check_held_out(source)
        if len(self._class_names) == 1:
            raise UserError(ONE_CLASS)

    def work(self) -> Work:
        """Return the work of an evaluation: encoding all splits."""
        images, test = sum(map(len, self.sources.values())), len(self.sources["test"])

        def limits(count: int) -> dict[str, int]:
            own = max(1, count * test // images)
            return {"limit": own, "train_limit": max(1, count - own)}

        return Work(images, limits=limits, least=LEAST_PROBED)

    def _check_apart(self) -> None:
        """Raise UserError if a split to fit to overlaps the held-out part that is the test split.

        The held-out part is drawn from train, so any split of train but train itself may contain
        its examples.
        """
        for part in ("train", "validation"):
            name = self._names.get(part, inputs.TRAINING)
            if name not in (inputs.TRAINING, inputs.VALIDATION):
                raise UserError(
                    f"evals: {part}_split: {name!r} overlaps the held-out 'val' of the dataset; "
                    "name the test split, too, as split=train[90%:]."
                )

    def __call__(self, variables: Any) -> Data:
        """Return features for these weights; raises UserError as `Features`, or for one class."""
        return self.joined({part: read(variables) for part, read in self.features.items()})

    def joined(self, found: dict[str, Labelled]) -> Data:
        """Return the data of a probe from the features of its parts; the test part may be missing.

        Raises UserError if there is one class.
        """
        train = found["train"]
        test = found.get("test", Labelled(train.features[:0], train.labels[:0]))
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
            raise UserError(ONE_CLASS)
        return Data(train, choose, final, test, classes)

    def details(self, data: Data, protocol: str) -> dict[str, Any]:
        """Return what `Result.details` says of the data and the protocol."""
        return {
            "protocol": protocol,
            **self._named,
            "train_split": self._names["train"],
            "chosen_on": self._validation
            or (f"{HELD_OUT:.0%} of train" if self._validation == "" else None),
            "layer": self._options.layer,
            "dimensions": data.train.features.shape[-1],
            "classes": data.classes,
            "train_images": int(data.final.sum()),
            "chosen_on_images": int(data.choose.sum()),
            "images": len(data.test.labels),
            "untrained_classes": len(untrained(data)),
            "images_of_untrained_classes": int(np.isin(data.test.labels, untrained(data)).sum()),
        }

    def name(self, label: int) -> str:
        """Return the name of a class, or its number."""
        return self._class_names[label] if label < len(self._class_names) else str(label)

    def lines(self, data: Data) -> tuple[str, ...]:
        """Return what `Result.lines` says of test images whose class cannot be predicted."""
        if not len(classes := untrained(data)):
            return ()
        names = ", ".join(self.name(k) for k in classes[:3])
        images = np.isin(data.test.labels, classes).sum()
        return (
            f"{images} of {len(data.test.labels)} test images count as wrong: their {len(classes)} "
            f"classes have no training image ({names}{', …' if len(classes) > 3 else ''})",
        )


def untrained(data: Data) -> np.ndarray:
    """Return the classes that have test images and no training images."""
    return np.setdiff1d(data.test.labels, data.train.labels[data.final])


def held_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Return indices of HELD_OUT of every class; raises UserError if there are too few images."""
    rows = subset.per_class(labels, _held_out_of, seed)
    if not len(rows):
        raise UserError(TOO_FEW.format(len(labels)))
    return rows


def check_held_out(source: Source) -> None:
    """Raise UserError as `held_out`; reads labels only until one class is large enough."""
    sizes: collections.Counter[int] = collections.Counter()
    for index in range(len(source)):
        label = without_image(source, index)["label"]
        sizes[label] += label >= 0
        if _held_out_of(sizes[label]):
            return
    raise UserError(TOO_FEW.format(len(source)))


def _held_out_of(count: int) -> int:
    return int(HELD_OUT * count + 0.5)
