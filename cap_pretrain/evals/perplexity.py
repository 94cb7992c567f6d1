"""Perplexity of a captioner on the captions of a split, and bits per token, byte, character."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Result, ScoringOptions
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.inference.scoring import Scoring
from cap_pretrain.learners.protocols import EmbedsText, ScoresTexts


class Perplexity:
    """Perplexity of all captions of every image; every token counts the same.

    Tokens are the tokenizer's, EOS included, so perplexity and bits per token compare only
    captioners with the same tokenizer. Bits per byte and per character compare any two: they are
    the bits of whole captions, EOS included, over the length of the text that the tokens decode to
    (lower-cased if the tokenizer does that; EOS has no length). Where captions answer a question,
    the question is given as a prompt and not counted.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(ScoringOptions):
        """Settings."""

    def __init__(self, context: Context, options: Options):
        """Build the evaluator; raise UserError without a captioner or captions."""
        if not options.part:
            options = dataclasses.replace(options, part=_captioner(context))
        self._context, self._options = context, options
        self._scoring = Scoring(context, options)
        if not self._scoring.has_prior:
            raise UserError(
                "evals: perplexity needs a captioner, and this learner is a dual encoder; remove "
                "the evaluator."
            )
        self._source = context.source(options.split, options.data)
        if not self._source[0]["captions"]:
            raise UserError(
                f"evals: perplexity needs captions, and {self._source} has none; name another "
                "dataset or set data.fields."
            )

    def work(self) -> Work:
        """Return the work of an evaluation: an image, and several captions without it."""
        count = len(self._source)
        return Work(min(count, self._options.limit or count), lambda n: 2.0 * n)

    def __call__(self, variables: Any) -> Result:
        """Score every caption; raises UserError if no image can be decoded or has a caption."""
        nats, tokens, texts, images, full = [], [], [], 0, 0
        for where, encoded in self._scoring.batches(variables, self._source, self._options.limit):
            rows = np.flatnonzero(where["mask"])
            examples = [self._source[int(where["index"][row])] for row in rows]
            captions = [example["captions"] for example in examples]
            if not any(captions):
                continue
            questions = [e.get("question", "") for e in examples for _ in e["captions"]]
            images += sum(map(bool, captions))
            # The captions of an image side by side, followed by padding without tokens.
            present = np.zeros((len(where["mask"]), max(map(len, captions))), bool)
            for row, own in zip(rows, captions, strict=True):
                present[row, : len(own)] = True
            answers = list(itertools.chain.from_iterable(captions))
            flat, given = self._scoring.encode_answers(questions, answers)
            text = np.zeros((*present.shape, flat.shape[1]), np.int32)
            prompts = np.zeros(present.shape, np.int32)
            text[present], prompts[present] = flat, given
            nats.append(-self._scoring.compare(variables, encoded, text, prompts)[present])
            lengths = np.sum(flat != 0, axis=1)
            tokens.append(lengths - given)
            full += int(np.sum(lengths == self._context.config.text.length))
            decode = self._context.tokenizer.decode
            texts += [decode(ids[n:]) for ids, n in zip(flat, given, strict=True)]
        if not texts:
            raise UserError(f"evals: perplexity found no caption in {self._source}.")
        return self._result(np.concatenate(nats), np.concatenate(tokens), texts, images, full)

    def _result(
        self, nats: np.ndarray, tokens: np.ndarray, texts: list[str], images: int, full: int
    ) -> Result:
        # The exact sum does not depend on the batches.
        total, count = math.fsum(nats), int(np.sum(tokens))
        bits = total / math.log(2)
        characters = sum(map(len, texts))
        size = sum(len(text.encode()) for text in texts)
        metrics = {
            "perplexity": math.exp(total / count),
            "bits_per_token": bits / count,
            "bits_per_byte": bits / max(size, 1),
            "bits_per_character": bits / max(characters, 1),
        }
        options = self._options
        details = {
            "protocol": "all captions of each image; every token counts the same, EOS included",
            **self._context.named(options.split, options.data),
            "images": images,
            "captions": len(texts),
            "tokens": count,
            "bytes": size,
            "characters": characters,
            # These may have been truncated.
            "captions_of_full_length": full,
        }
        return Result(metrics, details)


def _captioner(context: Context) -> str:
    """Return the name of the first part that scores texts as captions; "" is the learner itself."""
    for name, kind, _ in learners.members(context.config, context.kind):
        if issubclass(kind, ScoresTexts) and not issubclass(kind, EmbedsText):
            return name
    return ""
