"""Accuracy of a classifier."""

import dataclasses
from typing import Any

from cap_pretrain.data.requirements import check_reads
from cap_pretrain.data.sources import subset
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import BatchOptions, Context, Result
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.inference.portions import EveryImage
from cap_pretrain.evals.metrics import ranking
from cap_pretrain.evals.metrics.classification import accuracies, count_better_and_tied
from cap_pretrain.learners.protocols import Classifies


class Accuracy:
    """Top-1, top-5 and the mean over classes of top-1, for learners that have `classify`."""

    @dataclasses.dataclass(frozen=True)
    class Options(BatchOptions):
        """Settings; the dataset needs labels. `batch_size` does not affect the metrics.

        `limit` draws images at random, with a fixed seed, since many datasets are sorted by class.
        """

        batch_size: int = 256

    def __init__(self, context: Context, options: Options):
        """Build the evaluator; raises UserError if the learner is not a classifier."""
        able = context.able(Classifies)
        if able is None:
            raise UserError(
                f"evals: accuracy needs a classifier, and a {context.kind.__name__} is none; "
                "evaluate its encoder by linear_probe, knn or few_shot."
            )
        context = able
        self._context, self._options = context, options
        source = context.source(options.split, options.data)
        check_reads(source, ("label",), "evals: {}, which accuracy needs")
        self._source = subset.sample(source, options.limit, seed=0)

        def count(learner, images, labels):
            return *count_better_and_tied(learner.classify(images), labels), labels

        self._count = EveryImage(context, count, options.batch_size)

    def work(self) -> Work:
        """Return the work of an evaluation."""
        return Work(len(self._source))

    def __call__(self, variables: Any) -> Result:
        """Classify every image; raise UserError if none decodes or a label has no class."""
        better, tied, labels = self._count(variables, self._source)
        classes = self._context.config.learner.classes
        if labels.min() < 0 or labels.max() >= classes:
            raise UserError(
                f"evals: accuracy: {self._source} has labels from {labels.min()} to "
                f"{labels.max()}, and the classifier knows 0 to {classes - 1}; name another "
                "dataset."
            )
        details = {
            "protocol": f"the class with the highest logit; {ranking.TIES}",
            **self._context.named(self._options.split, self._options.data),
            "images": len(labels),
            "classes": classes,
        }
        return Result(accuracies(better, tied, labels), details)
