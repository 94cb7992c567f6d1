"""How often a classifier is right."""

import dataclasses
from typing import Any

from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.evals.metrics import ranking
from cap_pretrain.evals.portions import EveryImage
from cap_pretrain.evals.probes.probing import standing
from cap_pretrain.evals.zero_shot import accuracies
from cap_pretrain.learners.protocols import Classifies, learner_type


class Accuracy:
    """Top-1, top-5 and the mean over classes of top-1, of a learner that has `classify`."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings.

        Attributes:
          data: dataset with labels; "" is the run's own.
          split: "" is `data.eval_split`.
          batch_size: images a batch; changes no figure.
        """

        data: str = ""
        split: str = ""
        batch_size: int = 256

    def __init__(self, context: Context, options: Options):
        kind = learner_type(context.graphdef)
        if not issubclass(kind, Classifies):
            raise UserError(
                f"evals: accuracy is of classifiers, and a {kind.__name__} is none; its encoder is "
                "judged by linear_probe, knn or few_shot."
            )
        self._context, self._options = context, options
        self._source = context.source(options.split, options.data)

        def stand(learner, images, labels):
            return *standing(learner.classify(images), labels), labels

        self._stand = EveryImage(context, stand, options.batch_size)

    def __call__(self, variables: Any) -> Result:
        better, tied, labels = self._stand(variables, self._source)
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
