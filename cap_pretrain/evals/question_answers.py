"""Accuracy of answers to questions about images, compared with the answers of people."""

import collections
import dataclasses
import itertools
from typing import Any

import numpy as np

from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import BatchOptions, Context, PartOptions, Result
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.inference.captioning import Captioning
from cap_pretrain.evals.metrics.answer_accuracy import accuracy
from cap_pretrain.models.decoding import Decoding

RULE = "VQA accuracy (visualqa.org/evaluation), exact match where one answer is known"


class QuestionAnswers:
    """Accuracy of a captioner that was trained to answer questions, over all and by kind.

    The kinds are the dataset's labels: yes/no, number and other in VQAv2, the structural types in
    GQA. The result contains all answers in the format of the VQA challenge, which evaluates splits
    whose reference answers are not public.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(PartOptions, BatchOptions, Decoding):
        """Settings besides decoding; `samples` questions are recorded with their answers."""

        samples: int = 32

    def __init__(self, context: Context, options: Options):
        """Build the evaluator; raise UserError if the learner writes no text or none is asked."""
        self._context, self._options = context, options
        self._source = context.source(options.split, options.data)
        if not self._source[0].get("question"):
            raise UserError(
                f"evals: question_answers needs questions, and {self._source} has none; name "
                "another dataset or set data.fields.question."
            )
        self._captioning = Captioning(
            context,
            self._source,
            batch_size=options.batch_size,
            limit=options.limit or None,
            how=options,
            part=options.part,
        )

    def work(self) -> Work:
        """Return the work of an evaluation; see `Captioning.passes`."""
        count = min(len(self._source), self._options.limit or len(self._source))
        return Work(count, self._captioning.passes)

    def __call__(self, variables: Any) -> Result:
        """Answer every question; raises UserError if no image can be decoded."""
        judged: dict[str, list[float]] = {}  # accuracies by kind; "" is the kind of unlabeled ones
        answers: list[dict[str, Any]] = []
        samples: list[dict[str, Any]] = []
        for index, written in self._captioning.scored(variables):
            answer = written[0].text
            example = self._source[index]
            answers.append({"question_id": _question_id(example["id"]), "answer": answer})
            sample: dict[str, Any] = {"id": example["id"], "question": example["question"]}
            sample |= {"answer": answer, **self._captioning.recorded(written)}
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
        metrics = _means(judged) | {
            # These reveal a learner that has collapsed to the most common answer.
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
        return Result(metrics, details, tuple(lines))


def _means(judged: dict[str, list[float]]) -> dict[str, float]:
    """Return the mean accuracy over all questions and by kind, such as accuracy_yes_no."""
    if not judged:
        return {}
    metrics = {"accuracy": float(np.mean([*itertools.chain.from_iterable(judged.values())]))}
    for kind in sorted(filter(None, judged)):
        name = "".join(c if c.isalnum() else "_" for c in kind)
        metrics[f"accuracy_{name}"] = float(np.mean(judged[kind]))
    return metrics


def _question_id(text: str) -> int | str:
    """Return an id as a number where it is one, as the VQA challenge expects."""
    return int(text) if text.isdecimal() else text
