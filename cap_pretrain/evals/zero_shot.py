"""Zero-shot classification: the class whose name, put into captions, fits an image best."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.sources import subset
from cap_pretrain.data.sources.base import Source
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Result, ScoringOptions
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.inference.classes import TEMPLATES, ClassCaptions
from cap_pretrain.evals.inference.scoring import Scoring
from cap_pretrain.evals.metrics import ranking
from cap_pretrain.evals.metrics.classification import accuracies
from cap_pretrain.untrusted import read_bounded


class ZeroShot:
    """Accuracy of the class whose captions score highest; ties count as random choices.

    A class has one caption for each template; `ClassCaptions` has the rules by which these score.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(ScoringOptions):
        """Settings; the dataset needs labels.

        `limit` draws images at random, with a fixed seed, since many datasets are sorted by class.

        Attributes:
            classes: file with the name of each class, in the order of the labels: a JSON list, or
                one name per line. "" uses the dataset's class names; for `scenes`, captions such as
                "a red shape".
            templates: file with the templates, a JSON list or one per line, each with {} for the
                name. "" uses seven built-in ones; for `scenes`, beginnings of its captions.
        """

        classes: str = ""
        templates: str = ""

    def __init__(self, context: Context, options: Options):
        """Build the evaluator; raises UserError as `prompts`, or if a learner scores no text."""
        self._context, self._options = context, options
        self._scoring = Scoring(context, options)
        source = context.source(options.split, options.data)
        self.classes, self.templates = prompts(source, options.classes, options.templates)
        self._captions = ClassCaptions(self._scoring, self.classes, self.templates)
        self._source = subset.sample(source, options.limit, seed=0)
        self._scoring.check_prior()

    def work(self) -> Work:
        """Return the work of an evaluation: captioners decode every prompt for every image."""
        prompts = 0.5 * len(self.classes) * len(self.templates)
        each = 1 + prompts if self._scoring.has_prior else 1
        return Work(len(self._source), lambda n: prompts + n * each)

    def __call__(self, variables: Any) -> Result:
        """Classify the images; raise UserError if none is usable or a label has no name."""
        texts, scores_of = self._captions.prepared(variables)
        labels = []
        counts: dict[str, list[np.ndarray]] = {}  # suffix -> better and tied, [2, n] per batch
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
                counts.setdefault(suffix, []).append(self._count(by_class, label))
        label = np.concatenate(labels)
        if not len(label):
            raise UserError(f"evals: zero_shot found no labeled image in {self._source}.")
        metrics = {}
        for suffix, parts in counts.items():
            better, tied = np.concatenate(parts, axis=1)
            for name, value in accuracies(better, tied, label).items():
                metrics[f"{name}{suffix}"] = value
        return Result(metrics, self._details(label), self._captions.told.lines)

    def _count(self, scores: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Count the classes that beat and tie with the true one: [n, K], [n] -> int [2, n]."""
        right = np.take_along_axis(scores, label[:, None], axis=1)
        higher, equal = ranking.compare(scores, right, self._scoring.tolerance)
        return np.stack([higher.sum(1), equal.sum(1) - 1])

    def _details(self, label: np.ndarray) -> dict:
        of_class = "mean score" if self._scoring.has_prior else "score of the mean vector"
        return self._scoring.details(self._options.data, self._options.split) | {
            "protocol": f"the class with the highest {of_class} of its captions; {ranking.TIES}",
            "images": len(label),
            "classes": list(self.classes),
            "templates": list(self.templates),
            **self._captions.told.counts,
        }


def prompts(
    source: Source, classes: str, templates: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the class names and the templates; the arguments are as in `ZeroShot.Options`.

    Raises UserError if the dataset has no class names, or WordNet ids instead; a file cannot be
    read; the number of names is not that of the classes; or a template has no {}.
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
            f"evals: zero_shot: the classes of {source} are WordNet ids such as {own[0]}; give "
            "their names in words in a file (zero_shot.classes)."
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
    elif isinstance(source, Scenes) and not classes:
        chosen = source.class_templates
    else:
        chosen = TEMPLATES
    return tuple(names), tuple(chosen)


def read_list(field: str, path: str) -> Sequence[str]:
    """Read nonempty strings: a JSON list if the file's name ends in .json, else one per line.

    White space, line feeds in JSON included, becomes single spaces.

    `field` is the option that names the file, for messages. Raises UserError if the file cannot be
    read, is not such a list, or is empty.
    """
    try:
        # Some editors put a byte-order mark in front. Only line feeds end a line, not U+2028.
        text = read_bounded(Path(path).expanduser()).decode("utf-8-sig")
        entries = json.loads(text) if path.endswith(".json") else re.split("\r\n|\n|\r", text)
        json.dumps(entries, ensure_ascii=False).encode()  # fails for lone surrogates
    except (UserError, ValueError, RecursionError) as error:
        raise UserError(f"evals: zero_shot.{field}: cannot read {path!r} ({error}).") from error
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"evals: zero_shot.{field}: {path} is not a JSON list of strings.")
    if path.endswith(".json") and not all(map(str.strip, entries)):
        raise UserError(
            f"evals: zero_shot.{field}: {path} has an empty string; name it or drop it."
        )
    entries = [" ".join(entry.split()) for entry in entries if entry.strip()]
    if not entries:
        raise UserError(f"evals: zero_shot.{field}: {path} is empty.")
    return entries
