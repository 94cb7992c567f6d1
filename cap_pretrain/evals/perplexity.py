"""How well a captioner predicts the captions of a split: perplexity, bits per token and byte."""

import dataclasses
import math

import numpy as np

from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Result
from cap_pretrain.evals.scoring import Scoring


class Perplexity:
    """Perplexity of all captions of every image, each of which counts by its length.

    A token is a piece of the tokenizer, EOS included, so perplexity and bits per token compare
    captioners with one tokenizer only. Bits per byte and per character compare any two: the bits of
    whole captions, EOS included, over the length of the text that the tokens stand for (lower-cased
    if the tokenizer does that; its end has no length). A question that is answered by captions is
    given: it is read and does not count.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings.

        Attributes:
          data: dataset; "" is the run's own.
          split: "" is `data.eval_split`.
          batch_size: images a batch.
          pairs: captions that are scored at once.
          limit: at most so many images, the first ones; 0 is all.
        """

        data: str = ""
        split: str = ""
        batch_size: int = 64
        pairs: int = 512
        limit: int = 0

    def __init__(self, context: Context, options: Options):
        """Builds the evaluator.

        Raises:
          UserError: the learner is no captioner, or the dataset has no captions.
        """
        self._context, self._options = context, options
        self._scoring = Scoring(context, batch_size=options.batch_size, pairs=options.pairs)
        if not self._scoring.has_prior:
            raise UserError(
                "evals: perplexity is a figure of captioners, and this learner compares vectors; "
                "leave it out."
            )
        self._source = context.source(options.split, options.data)
        if not self._source[0]["captions"]:
            raise UserError(
                f"evals: perplexity is that of captions, and {self._source} has none; name another "
                "dataset or set data.fields."
            )

    def __call__(self, variables) -> Result:
        nats, tokens, texts, images, full = [], [], [], 0, 0
        for where, encoded in self._scoring.batches(variables, self._source, self._options.limit):
            rows = np.flatnonzero(where["mask"])
            examples = [self._source[int(where["index"][row])] for row in rows]
            captions = [example["captions"] for example in examples]
            if not any(captions):
                continue
            questions = [e.get("question", "") for e in examples for _ in e["captions"]]
            images += sum(map(bool, captions))
            # All captions of an image side by side, and padding, which has no tokens, after them.
            there = np.zeros((len(where["mask"]), max(map(len, captions))), bool)
            for row, own in zip(rows, captions, strict=True):
                there[row, : len(own)] = True
            flat, given = self._scoring.encode_answers(questions, sum(captions, []))
            text = np.zeros((*there.shape, flat.shape[1]), np.int32)
            prompts = np.zeros(there.shape, np.int32)
            text[there], prompts[there] = flat, given
            nats.append(-self._scoring.compare(variables, encoded, text, prompts)[there])
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
        total, count = math.fsum(nats), int(np.sum(tokens))  # in float64, in whatever batches
        bits = total / math.log(2)
        characters = sum(map(len, texts))
        size = sum(len(text.encode()) for text in texts)
        figures = {
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
            # Which may have been cut to fit.
            "captions_of_full_length": full,
        }
        return Result(figures, details)
