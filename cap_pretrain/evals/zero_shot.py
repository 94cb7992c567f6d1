"""Zero-shot classification: which class name, put into a caption, fits the image best."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.sources import subset
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.evals.metrics import ranking
from cap_pretrain.evals.scoring import Scoring

# In the spirit of those of CLIP (Radford et al. 2021, section 3.1.4), few and plain.
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "an image of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a {} in a photo.",
    "a {}.",
)


class ZeroShot:
    """Accuracy of the class whose captions score highest; ties count as guessing among them.

    A class has one caption for each template. Dual encoders compare the image with the mean of
    their unit vectors, made a unit vector again (CLIP's prompt ensemble). Captioners have three
    rules, each a mean over the templates:

      (no suffix)   log p(caption | image)
      _over_prior   log p(caption | image) - log p(caption | blank image): what the image adds
      _per_token    log p(caption | image) / number of tokens
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings.

        Attributes:
          data: dataset with labels; "" is the run's own.
          split: "" is `data.eval_split`.
          classes: file with the name of each class, in the order of the labels: a JSON list, or one
            a line. "" takes the dataset's own names; for `scenes`, captions such as "a red shape".
          templates: file with the templates, JSON or lines, each with {} where the name goes. ""
            takes seven built-in ones; for `scenes`, openings of its captions.
          batch_size: images a batch.
          pairs: (image, caption) pairs that a captioner scores at once.
          limit: at most so many images, drawn at random but always the same, since many a dataset
            lies class by class; 0 is all.
        """

        data: str = ""
        split: str = ""
        classes: str = ""
        templates: str = ""
        batch_size: int = 64
        pairs: int = 512
        limit: int = 0

    def __init__(self, context: Context, options: Options):
        self._context, self._options = context, options
        self._scoring = Scoring(context, batch_size=options.batch_size, pairs=options.pairs)
        source = context.source(options.split, options.data)
        self.classes, self.templates = prompts(source, options.classes, options.templates)
        self._source = subset.sample(source, options.limit, seed=0)
        texts = [
            template.replace("{}", name) for name in self.classes for template in self.templates
        ]
        self._tokens = self._scoring.encode(texts)

    def __call__(self, variables) -> Result:
        rule = self._captioner_rules if self._scoring.has_prior else self._dual_encoder_rule
        texts, scores_of = rule(variables)
        labels, standings = [], {}
        for where, images in self._scoring.batches(variables, self._source, limit=0):
            real = where["mask"] & (where["label"] >= 0)
            label = where["label"][real]
            if np.any(label >= len(self.classes)):
                raise UserError(
                    f"evals: zero_shot.classes: {self._source} has the label {label.max()}, but "
                    f"there are {len(self.classes)} names; give one for each."
                )
            labels.append(label)
            scores = self._scoring.compare(variables, images, texts)[real]
            for suffix, by_class in scores_of(scores).items():
                standings.setdefault(suffix, []).append(self._stand(by_class, label))
        label = np.concatenate(labels)
        if not len(label):
            raise UserError(f"evals: zero_shot found no labelled image in {self._source}.")
        figures = {}
        for suffix, parts in standings.items():
            better, tied = np.concatenate(parts, axis=1)
            figures |= {
                f"{name}{suffix}": value for name, value in accuracies(better, tied, label).items()
            }
        return Result(figures, self._details(label))

    def _stand(self, scores: np.ndarray, label: np.ndarray) -> np.ndarray:
        """scores [n, K], label [n] -> how many classes beat and tie with the right one, [2, n]."""
        right = np.take_along_axis(scores, label[:, None], axis=1)
        higher, equal = ranking.compare(scores, right, self._scoring.tolerance)
        return np.stack([higher.sum(1), equal.sum(1) - 1])

    def _dual_encoder_rule(self, variables):
        vectors = self._scoring.text_features(variables, self._tokens)
        return ensemble(vectors.reshape(len(self.classes), len(self.templates), -1)), _as_they_are

    def _captioner_rules(self, variables):
        prior = self._scoring.prior(variables, self._tokens)
        lengths = np.sum(self._tokens != 0, axis=1)

        def rules(scores):
            rules = {"": scores, "_over_prior": scores - prior, "_per_token": scores / lengths}
            shape = (len(scores), len(self.classes), len(self.templates))
            return {suffix: x.reshape(shape).mean(2) for suffix, x in rules.items()}

        return self._tokens, rules

    def _details(self, label: np.ndarray) -> dict:
        of_class = "mean score" if self._scoring.has_prior else "score of the mean vector"
        return self._scoring.details(self._options.data, self._options.split) | {
            "protocol": f"the class with the highest {of_class} of its captions; {ranking.TIES}",
            "images": len(label),
            "classes": list(self.classes),
            "templates": list(self.templates),
        }


def _as_they_are(scores: np.ndarray) -> dict[str, np.ndarray]:
    return {"": scores}


def ensemble(vectors: np.ndarray) -> np.ndarray:
    """Unit vectors [K, templates, D] -> one unit vector for each class, [K, D] float32."""
    mean = vectors.astype(np.float64).mean(1)
    return (mean / np.linalg.norm(mean, axis=1, keepdims=True)).astype(np.float32)


def accuracies(better: np.ndarray, tied: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Top-1, top-5 and the mean over classes of top-1.

    Args:
      better: int [n], how many wrong classes score higher than the right one.
      tied: int [n], how many wrong classes score the same.
      label: int [n], the right class; classes without images do not count.
    """
    top1 = ranking.share_in_top(1, better, tied)
    per_class = [top1[label == k].mean() for k in np.unique(label)]
    return {
        "top1": float(top1.mean()),
        "top5": float(ranking.share_in_top(5, better, tied).mean()),
        "mean_per_class": float(np.mean(per_class)),
    }


def prompts(source, classes: str, templates: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of the classes and the templates they go into; see `ZeroShot.Options`.

    Raises:
      UserError: a dataset without class names or with numbers in their place, a file that cannot be
        read, another number of names than classes, a template without {}.
    """
    own = tuple(source.class_names)
    if classes:
        names = read_list("classes", classes)
        if own and len(names) != len(own):
            raise UserError(
                f"evals: zero_shot.classes: {classes} has {len(names)} names, but {source} has "
                f"{len(own)} classes; give one name for each, in the order of the labels."
            )
    elif not own:
        raise UserError(
            f"evals: zero_shot: {source} has no class names; name a dataset with labels, or give "
            "the names in a file (zero_shot.classes)."
        )
    elif all(re.fullmatch(r"n\d{8}", name) for name in own):
        raise UserError(
            f"evals: zero_shot: the classes of {source} are named as {own[0]}, by their numbers in "
            "WordNet; give their names in words in a file (zero_shot.classes)."
        )
    else:
        names = source.class_captions if isinstance(source, Scenes) else own
    if templates:
        chosen = read_list("templates", templates)
        for template in chosen:
            if "{}" not in template:
                raise UserError(
                    f"evals: zero_shot.templates: {templates} has the template {template!r}; put "
                    "{} where the name of the class goes."
                )
    else:
        captions = isinstance(source, Scenes) and not classes
        chosen = source.class_templates if captions else TEMPLATES
    return tuple(names), tuple(chosen)


def read_list(field: str, path: str) -> Sequence[str]:
    """Reads a JSON list of strings, or one string a line (empty ones left out).

    Raises:
      UserError: the file cannot be read, is no such list, or holds nothing.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        entries = json.loads(text) if path.endswith(".json") else text.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"evals: zero_shot.{field}: cannot read {path!r} ({error}).") from error
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"evals: zero_shot.{field}: {path} is not a JSON list of strings.")
    entries = [entry.strip() for entry in entries if entry.strip()]
    if not entries:
        raise UserError(f"evals: zero_shot.{field}: {path} is empty.")
    return entries
