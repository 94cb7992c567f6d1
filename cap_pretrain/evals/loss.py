"""The learner's own loss and metrics on held-out data, and a unigram baseline for captions."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cap_pretrain import inputs, learners
from cap_pretrain.data.requirements import check_reads
from cap_pretrain.data.sources.base import without_image
from cap_pretrain.errors import UserError
from cap_pretrain.evals import examples
from cap_pretrain.evals.base import BatchOptions, Context, Result
from cap_pretrain.evals.exhibits import Exhibit
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.retrieval import Retrieval
from cap_pretrain.learners.protocols import Contrasts, EmbedsText
from cap_pretrain.learners.weights import has_own, is_weight, weight_of
from cap_pretrain.telemetry import console

UNIGRAM_CAPTIONS = 50_000  # Training captions that the unigram model is estimated from


class Loss:
    """Validation loss, exact over the split: each example counts once, whatever the batch size.

    A contrastive loss depends on the batch: it is averaged over batches, weighted by examples.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(BatchOptions):
        """Settings; `unigram` also reports the loss of a unigram model, which captioners must beat.

        That ignores image and context; its token frequencies are those of the training captions.
        """

        unigram: bool = False

    def __init__(self, context: Context, options: Options):
        self._context, self._options = context, options
        self._source = context.source(options.split, options.data)
        learner = context.kind.__name__
        reads = learners.reads(context.config)
        for own in learners.needs(context.config):
            check_reads(self._source, own, f"evals: {{}}, which a {learner} needs")
        if options.unigram and "text" not in reads:
            raise UserError(f"evals: loss.unigram is for captions, but a {learner} reads none.")
        over = "examples"
        if issubclass(context.kind, Contrasts):
            over = f"batches of {options.batch_size}, weighted by their examples"
        named = context.named(options.split, options.data)
        self._details = {"protocol": f"the learner's own loss, its mean over {over}", **named}
        self._loss = context.jit(_loss_and_metrics)
        self._illustrations = examples.Illustrations(context, self._source)
        self._unigram: dict[str, float] | None = None
        self._retrieval: Retrieval | None = None  # of few examples, to show

    def __call__(self, variables: Any) -> Result:
        """Average the learner's loss and metrics over the split."""
        totals: dict[str, float] = {}
        count = 0
        for batch, _ in self._batches():
            values = {k: float(v) for k, v in jax.device_get(self._loss(variables, batch)).items()}
            count += int(values.pop("examples"))
            for name, value in values.items():
                weight = 1.0 if is_weight(name) else values[weight_of(name, values)]
                totals[name] = totals.get(name, 0.0) + weight * value
        metrics = {
            name: total / max(totals[weight_of(name, totals)], 1e-9)
            for name, total in totals.items()
            # A metric with a weight for itself is that of a task, which these data may lack.
            if not is_weight(name)
            and (totals[weight_of(name, totals)] or not has_own(name, totals))
        }
        parts = [name.removesuffix("/loss") for name in metrics if name.endswith("/loss")]
        if parts:  # each of them a mean, weighted by part
            metrics["loss"] = sum(metrics[f"{p}/weight"] * metrics[f"{p}/loss"] for p in parts)
        if self._options.unigram:
            if self._unigram is None:
                with console.doing("Counting the tokens of training captions", say=False):
                    self._unigram = {"unigram_loss": self._unigram_loss()}
            metrics |= self._unigram
        shown = examples.attempted(self._context, lambda: self._exhibits(variables))
        return Result(metrics, self._details | {"examples": count}, exhibits=shown)

    def _exhibits(self, variables: Any) -> Iterable[Exhibit]:
        """Return what a pretext task predicts, or which captions a dual encoder retrieves."""
        config, options = self._context.config, self._options
        searched = any(section.evaluator == "retrieval" for section in config.evals.values())
        if self._context.able(EmbedsText) and not searched:
            if self._retrieval is None:
                own = Retrieval.Options(options.data, options.split, limit=examples.COMPARED)
                self._retrieval = Retrieval(self._context, own)
            return self._retrieval(variables).exhibits
        return self._illustrations(variables)

    def work(self) -> Work:
        """Return the work of an evaluation."""
        return Work(min(len(self._source), self._limit or len(self._source)))

    @property
    def _limit(self) -> int | None:
        return self._options.limit or None

    def _batches(self):
        return self._context.batches(self._source, self._options.batch_size, self._limit)

    def _unigram_loss(self) -> float:
        """Return the mean over captions of the mean over tokens, with add-one smoothing."""
        config, tokenizer = self._context.config, self._context.tokenizer
        train = inputs.open_data(config, config.data.split)
        counts = np.ones(tokenizer.vocab_size)
        captions = (c for i in range(len(train)) for c in without_image(train, i)["captions"])
        for caption in itertools.islice(captions, UNIGRAM_CAPTIONS):
            ids = tokenizer.encode(caption)
            np.add.at(counts, ids[ids != tokenizer.pad_id], 1)
        nll = -np.log(counts / counts.sum())
        losses = []
        for index in range(min(len(self._source), self._limit or len(self._source))):
            for caption in without_image(self._source, index)["captions"][:1]:
                ids = tokenizer.encode(caption)
                losses.append(nll[ids[ids != tokenizer.pad_id]].mean())
        return float(np.mean(losses))


def _loss_and_metrics(learner, batch):
    # Evaluation is deterministic, but the signature asks for a key.
    loss, metrics = learner.loss(batch, jax.random.key(0), train=False)
    examples = jnp.sum(batch["mask"])
    return {"loss": loss, "loss_weight": examples, **metrics, "examples": examples}
