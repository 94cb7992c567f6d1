"""Composition: whether the true caption scores above false ones that hardly differ from it."""

import dataclasses

import numpy as np

from cap_pretrain.data.hard_negatives import OrderQuestions, Question, QuestionSet, SceneQuestions
from cap_pretrain.data.sugarcrepe import SugarCrepe
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.evals.metrics import ranking
from cap_pretrain.evals.scoring import Scoring

SETS = ("scenes", "order", "sugarcrepe")


class Composition:
    """Accuracy on questions with one true caption; a tie counts as guessing among the tied.

    Figures, each as `NAME_KIND` for each kind of false caption (the true one against it alone, so
    that chance is 1/2) and as `NAME`, the mean over kinds:

      accuracy    the true caption has the higher score
      over_prior  (captioners) it has, after the score for a blank image is taken off: what the
                  image adds
      blind       (captioners) it has for a blank image. The same decoder, which never saw the
                  image: what a language prior alone solves. Dual encoders have no such score, and
                  no opinion on a text without an image: 1/2.

    Where questions have several false captions, `NAME_all` is the true one's against all of them
    at once, as ARO's Precision@1; `chance_all` is that of guessing.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings.

        Attributes:
          questions: "scenes" (one thing changed, by kind), "order" (words in other orders, of any
            captioned dataset), or "sugarcrepe".
          data: dataset of "order"; "" is the run's own.
          split: of "scenes" or "order"; "" is `data.eval_split`.
          annotations: of "sugarcrepe": the folder with its json files.
          images: of "sugarcrepe": folder or zip with the images of COCO's val2017.
          batch_size: images a batch.
          pairs: (image, caption) pairs that a captioner scores at once.
          limit: at most so many images, the first ones; 0 is all.
        """

        questions: str = "scenes"
        data: str = ""
        split: str = ""
        annotations: str = ""
        images: str = ""
        batch_size: int = 64
        pairs: int = 512
        limit: int = 0

        def __post_init__(self):
            if self.questions not in SETS:
                raise UserError(
                    f"evals: composition.questions: there is no {self.questions!r}."
                    f"{did_you_mean(self.questions, SETS)}"
                )

    def __init__(self, context: Context, options: Options):
        self._context, self._options = context, options
        self._scoring = Scoring(context, batch_size=options.batch_size, pairs=options.pairs)
        self._set = question_set(context, options)
        count = min(len(self._set.source), options.limit or len(self._set.source))
        self._questions = [self._set.questions(index) for index in range(count)]
        number: dict[str, int] = {}  # of each different text
        self._texts = [
            [number.setdefault(text, len(number)) for text in candidates(asked)]
            for asked in self._questions
        ]
        if not number:
            raise UserError(f"evals: composition: {self._set.source} gives no question to ask.")
        self._tokens = self._scoring.encode(list(number))

    def __call__(self, variables) -> Result:
        scoring = self._scoring
        features = scoring.text_features(variables, self._tokens)
        prior = scoring.prior(variables, self._tokens) if scoring.has_prior else None
        tally, images = Tally(scoring.tolerance), 0
        for where, pictures in scoring.batches(variables, self._set.source, self._options.limit):
            texts = [self._texts[index] for index in where["index"]]
            own = np.zeros((len(texts), max(1, *map(len, texts))), int)
            for row, listed in zip(own, texts, strict=True):
                row[: len(listed)] = listed
            scores = scoring.compare(variables, pictures, features[own])
            for row in np.flatnonzero(where["mask"]):
                listed = texts[row]
                rules = {"accuracy": scores[row, : len(listed)]}
                if prior is not None:
                    rules["over_prior"] = rules["accuracy"] - prior[listed]
                    rules["blind"] = prior[listed]
                tally.add(self._questions[where["index"][row]], rules)
                images += bool(listed)
        return Result(tally.figures(), self._details(images, tally))

    def _details(self, images: int, tally: "Tally") -> dict:
        options = self._options
        details = self._scoring.details(options.data, options.split)
        if options.questions != "order":
            details["dataset"] = options.questions
        if options.questions == "sugarcrepe":
            details["split"] = ""
        return details | {
            "protocol": f"{self._set.protocol}; the true caption is to score highest; "
            f"{ranking.TIES}",
            "images": images,
            "questions": tally.questions,
            "questions_by_kind": tally.counts(),
        }


class Tally:
    """Adds up which captions were told apart, by rule and by kind."""

    def __init__(self, tolerance: float):
        self.questions = 0
        self._tolerance = tolerance
        self._by_kind: dict[str, dict[str, list[float]]] = {}  # rule -> kind -> one a question
        self._of_all: dict[str, list[float]] = {}  # rule -> one a question
        self._chance_of_all: list[float] = []

    def add(self, questions: list[Question], rules: dict[str, np.ndarray]) -> None:
        """Counts the questions about an image; `rules` are scores in the order of `candidates`."""
        place = {text: k for k, text in enumerate(candidates(questions))}
        for question in questions:
            true, false = place[question.true], [place[text] for text in question.false.values()]
            self.questions += 1
            self._chance_of_all.append(1 / (1 + len(false)))
            for rule, scores in rules.items():
                better, tied = ranking.compare(scores[false], scores[true], self._tolerance)
                shares = ranking.share_in_top(1, better, tied)
                by_kind = self._by_kind.setdefault(rule, {})
                for kind, share in zip(question.false, shares, strict=True):
                    by_kind.setdefault(kind, []).append(share)
                of_all = ranking.share_in_top(1, better.sum(), tied.sum())
                self._of_all.setdefault(rule, []).append(of_all)

    def counts(self) -> dict[str, int]:
        """kind -> number of questions that have it."""
        return {kind: len(shares) for kind, shares in sorted(self._by_kind["accuracy"].items())}

    def figures(self) -> dict[str, float]:
        """As `Composition` says."""
        figures = {}
        several = min(self._chance_of_all) < 0.5
        for rule, by_kind in self._by_kind.items():
            means = {kind: float(np.mean(shares)) for kind, shares in sorted(by_kind.items())}
            figures[rule] = float(np.mean(list(means.values())))
            figures |= {f"{rule}_{kind}": mean for kind, mean in means.items()}
            if several:
                figures[f"{rule}_all"] = float(np.mean(self._of_all[rule]))
        if several:
            figures["chance_all"] = float(np.mean(self._chance_of_all))
        return figures


def candidates(questions: list[Question]) -> list[str]:
    """The different captions of the questions about an image, true and false."""
    texts = {}
    for question in questions:
        texts |= dict.fromkeys((question.true, *question.false.values()))
    return list(texts)


def question_set(context: Context, options: Composition.Options) -> QuestionSet:
    """Opens the questions that the options name."""
    if options.questions == "sugarcrepe":
        return SugarCrepe(options.annotations, options.images)
    if options.questions == "order":
        return OrderQuestions(context.source(options.split, options.data))
    return SceneQuestions(context.source(options.split, "scenes"))
