"""Answers to questions about images, judged by what people answered."""

import collections
import dataclasses
from typing import Any

import numpy as np

from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.evals.captions import Captioning
from cap_pretrain.evals.metrics.answer_accuracy import accuracy
from cap_pretrain.models.decoding import Decoding

RULE = "VQA accuracy (visualqa.org/evaluation), exact match where one answer is known"


class QuestionAnswers:
    """Accuracy of a captioner that was taught to answer questions, over all and by kind.

    The kinds are the labels of the dataset: yes/no, number and other of VQAv2, the structural types
    of GQA. All answers are kept in the form that the VQA challenge takes; where a split has no
    answers to compare with, that is what it is for.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(Decoding):
        """Settings: how answers are decoded (see `Decoding`), and

        Attributes:
          data: dataset; "" is the run's own.
          split: "" is `data.eval_split`.
          batch_size: questions a batch.
          limit: at most so many questions, the first ones; 0 is all.
          samples: questions that are kept with all they were answered; the console shows some.
        """

        data: str = ""
        split: str = ""
        batch_size: int = 128
        limit: int = 0
        samples: int = 32

    def __init__(self, context: Context, options: Options):
        """Builds the evaluator.

        Raises:
          UserError: the learner writes no text, or the dataset asks no questions.
        """
        self._context, self._options = context, options
        self._source = context.source(options.split, options.data)
        if not self._source[0].get("question"):
            raise UserError(
                f"evals: question_answers answers questions, and {self._source} has none; name "
                "another dataset or set data.fields.question."
            )
        self._captioning = Captioning(
            context,
            self._source,
            batch_size=options.batch_size,
            limit=options.limit or None,
            how=options,
        )

    def __call__(self, variables) -> Result:
        judged: dict[str, list[float]] = {}  # by kind; that of "" is none
        answers, samples = [], []
        for index, answer in self._captioning(variables):
            example = self._source[index]
            answers.append({"question_id": _number_if_one(example["id"]), "answer": answer})
            sample = {"id": example["id"], "question": example["question"], "answer": answer}
            if references := list(example["captions"]):
                label = example["label"]
                kind = self._source.class_names[label] if label >= 0 else ""
                sample |= {"references": references, "accuracy": accuracy(answer, references)}
                judged.setdefault(kind, []).append(sample["accuracy"])
            if len(samples) < self._options.samples:
                samples.append(sample)
        if not answers:
            raise UserError(f"evals: {self._source} has no image that can be decoded.")
        counts = collections.Counter(entry["answer"] for entry in answers)
        ((commonest, times),) = counts.most_common(1)
        figures = _means(judged) | {
            # Learners are known to collapse to the commonest answer without anybody noticing.
            "distinct_share": len(counts) / len(answers),
            "commonest_share": times / len(answers),
        }
        options = self._options
        details = {
            "protocol": f"{options.described}; {RULE}",
            **self._context.named(options.split, options.data),
            "questions": len(answers),
            "judged": sum(map(len, judged.values())),
            "judged_by_kind": {kind: len(judged[kind]) for kind in sorted(judged) if kind},
            "commonest": commonest,
            "samples": samples,
            "answers": answers,
        }
        lines = (f"{s['id']}: {s['question']} {s['answer']}" for s in samples[:5])
        return Result(figures, details, tuple(lines))


def _means(judged: dict[str, list[float]]) -> dict[str, float]:
    """The accuracy of all, and by kind, such as accuracy_yes_no."""
    if not judged:
        return {}
    figures = {"accuracy": float(np.mean(sum(judged.values(), [])))}
    for kind in sorted(filter(None, judged)):
        name = "".join(c if c.isalnum() else "_" for c in kind)
        figures[f"accuracy_{name}"] = float(np.mean(judged[kind]))
    return figures


def _number_if_one(text: str) -> Any:
    """An id as the VQA challenge has it, a number, where it is one."""
    return int(text) if text.isdecimal() else text
