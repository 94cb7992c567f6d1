"""Composition: whether a true caption scores above hard negatives, which differ little from it."""

import dataclasses
import functools
from typing import Any, cast

import numpy as np

from cap_pretrain.data.hard_negatives import OrderQuestions, Question, SceneQuestions
from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.sources.base import Source
from cap_pretrain.data.sugarcrepe import SugarCrepe
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.evals.base import Context, Result, ScoringOptions
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.inference.scoring import Scoring, Told
from cap_pretrain.evals.metrics import ranking

SETS = ("auto", "scenes", "order", "sugarcrepe")


class Composition:
    """Accuracy on questions with one true caption; a tie counts as a random choice among the tied.

    Each metric is reported as `NAME_KIND` for each kind of false caption (the true caption against
    that one alone, so that chance is 1/2) and as `NAME`, the mean over kinds:

        accuracy    the true caption has the higher score
        over_prior  (captioners) the true caption has the higher score minus prior, the score for a
                    blank image: what the image adds
        blind       (captioners) the true caption has the higher prior: what the language model
                    solves without seeing the image. Dual encoders cannot score a text without an
                    image, which is chance, 1/2.

    Where questions have several false captions, `NAME_all` compares the true one with all of them
    at once, as ARO's Precision@1 does; `chance_all` is its value for guessing.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(ScoringOptions):
        """Settings. `data` is used by "auto" and "order", `split` by all but "sugarcrepe".

        `questions` is "scenes" (one property of a scene changed), "order" (shuffled words, for any
        captioned dataset), "sugarcrepe", which needs `annotations` and `images`, or "auto": scenes
        if the data are, else order.
        """

        questions: str = "auto"
        annotations: str = ""  # SugarCrepe's folder, or its folder `data`; json or json.gz
        images: str = ""  # folder or zip with images of COCO's val2017, perhaps not all

        def __post_init__(self):
            if self.questions not in SETS:
                raise UserError(
                    f"evals: composition.questions: no set {self.questions!r}."
                    f"{did_you_mean(self.questions, SETS)}"
                )

        @property
        def reads_data(self) -> bool:
            """Whether `data` has an effect."""
            return self.questions in ("auto", "order")

    def __init__(self, context: Context, options: Options):
        """Build the evaluator; raise UserError if the learner scores no texts or the set is bad."""
        self._context, self._options = context, options
        self._scoring = Scoring(context, options)
        self._set = question_set(context, options)
        # A cast, since mypy takes the property `class_names` of Scenes for another type.
        self._source = cast(Source, self._set.source)
        self._scoring.check_prior()
        self._count = min(len(self._source), options.limit or len(self._source))
        if not any(map(self._set.questions, range(self._count))):
            raise UserError(f"evals: composition: {self._source} yields no questions.")

    @functools.cached_property
    def _questions(self) -> list[list[Question]]:
        """The questions of each image."""
        return [self._set.questions(index) for index in range(self._count)]

    @functools.cached_property
    def _candidates(self) -> tuple[np.ndarray, list[list[int]], Told]:
        """The tokens of all distinct texts, and which of them are the candidates of each image."""
        number: dict[str, int] = {}
        texts = [
            [number.setdefault(text, len(number)) for text in candidates(questions)]
            for questions in self._questions
        ]
        tokens = self._scoring.encode(list(number))
        return tokens, texts, self._scoring.told_apart("texts", list(number), tokens)

    def work(self) -> Work:
        """Return the work of an evaluation: an image has some ten texts."""
        return Work(self._count, lambda n: 6.0 * n)

    def __call__(self, variables: Any) -> Result:
        """Score the candidates of every question."""
        scoring, (tokens, texts_of, ties) = self._scoring, self._candidates
        features = scoring.text_features(variables, tokens)
        prior = scoring.prior(variables, tokens) if scoring.has_prior else None
        tally, images = Tally(scoring.tolerance), 0
        for where, pictures in scoring.batches(variables, self._source, self._options.limit):
            texts = [texts_of[index] for index in where["index"]]
            padded = np.zeros((len(texts), max(1, *map(len, texts))), int)
            for row, own in zip(padded, texts, strict=True):
                row[: len(own)] = own
            scores = scoring.compare(variables, pictures, features[padded])
            for k in np.flatnonzero(where["mask"]):
                own = texts[k]
                rules = {"accuracy": scores[k, : len(own)]}
                if prior is not None:
                    rules["over_prior"] = rules["accuracy"] - prior[own]
                    rules["blind"] = prior[own]
                tally.add(self._questions[where["index"][k]], rules)
                images += bool(own)
        lines = (*ties.lines, *self._set.lines) if isinstance(self._set, SugarCrepe) else ties.lines
        return Result(tally.metrics(), self._details(images, tally) | ties.counts, lines)

    def _details(self, images: int, tally: "Tally") -> dict:
        options = self._options
        details: dict[str, Any] = self._scoring.details(options.data, options.split)
        if not options.reads_data:
            details["dataset"] = options.questions
        if isinstance(self._set, SugarCrepe):
            details |= {"split": "", **self._set.counts}
        return details | {
            "protocol": f"{self._set.protocol}; the true caption is to score highest; "
            f"{ranking.TIES}",
            "images": images,
            "questions": tally.questions,
            "questions_by_kind": tally.counts(),
        }


class Tally:
    """Accumulates results by rule (a metric's name) and by kind of false caption.

    Scores that differ by no more than `tolerance` are equal; `questions` counts what was added.
    """

    def __init__(self, tolerance: float):
        self.questions = 0
        self._tolerance = tolerance
        # Probabilities of choosing the true caption: rule -> kind -> one per question,
        self._by_kind: dict[str, dict[str, list[float]]] = {}
        # and against all false captions at once: rule -> one per question.
        self._of_all: dict[str, list[float]] = {}
        self._chance_of_all: list[float] = []

    def add(self, questions: list[Question], rules: dict[str, np.ndarray]) -> None:
        """Add an image's questions; `rules`: rule -> scores of `candidates(questions)` in order."""
        place = {text: k for k, text in enumerate(candidates(questions))}
        for question in questions:
            true, false = place[question.true], [place[text] for text in question.false.values()]
            self.questions += 1
            self._chance_of_all.append(1 / (1 + len(false)))
            for rule, scores in rules.items():
                better, tied = ranking.compare(scores[false], scores[true], self._tolerance)
                correct = ranking.probability_in_top(1, better, tied)
                by_kind = self._by_kind.setdefault(rule, {})
                for kind, value in zip(question.false, correct, strict=True):
                    by_kind.setdefault(kind, []).append(value)
                of_all = ranking.probability_in_top(1, better.sum(), tied.sum())
                self._of_all.setdefault(rule, []).append(float(of_all))

    def counts(self) -> dict[str, int]:
        """Return the number of questions with each kind of false caption."""
        return {kind: len(values) for kind, values in sorted(self._by_kind["accuracy"].items())}

    def metrics(self) -> dict[str, float]:
        """Return the metrics that `Composition` names."""
        metrics = {}
        several = min(self._chance_of_all) < 0.5
        for rule, by_kind in self._by_kind.items():
            means = {kind: float(np.mean(values)) for kind, values in sorted(by_kind.items())}
            metrics[rule] = float(np.mean(list(means.values())))
            metrics |= {f"{rule}_{kind}": mean for kind, mean in means.items()}
            if several:
                metrics[f"{rule}_all"] = float(np.mean(self._of_all[rule]))
        if several:
            metrics["chance_all"] = float(np.mean(self._chance_of_all))
        return metrics


def candidates(questions: list[Question]) -> list[str]:
    """Return the distinct captions, true and false, of the questions about an image."""
    texts: dict[str, None] = {}
    for question in questions:
        texts |= dict.fromkeys((question.true, *question.false.values()))
    return list(texts)


def question_set(
    context: Context, options: Composition.Options
) -> SugarCrepe | OrderQuestions | SceneQuestions:
    """Open the set of questions that the options name."""
    if options.questions == "sugarcrepe":
        return SugarCrepe(options.annotations, options.images)
    if options.reads_data:
        source = context.source(options.split, options.data)
        if options.questions == "order" or not isinstance(source, Scenes):
            return OrderQuestions(source)
        return SceneQuestions(source)
    scenes = context.source(options.split, "scenes")
    if not isinstance(scenes, Scenes):
        raise UserError('evals: composition: questions "scenes" are of the dataset `scenes` only.')
    return SceneQuestions(scenes)
