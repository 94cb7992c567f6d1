"""Captions of a split, scored by its references as the COCO evaluation does."""

import collections
import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import numpy as np

from cap_pretrain.data.sources.base import parse_mixture
from cap_pretrain.distributed import cluster
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Interrupted, Result
from cap_pretrain.evals.captions import Captioning
from cap_pretrain.evals.metrics import caption_metrics
from cap_pretrain.models.decoding import Decoding


class CaptionScores:
    """BLEU, METEOR, ROUGE-L, CIDEr-D and SPICE of a captioner's captions.

    The captions are kept with their references; tools/score_captions.py scores them again, as where
    there was no Java.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(Decoding):
        """Settings: how captions are decoded (see `Decoding`), and

        Attributes:
          data: dataset; "" is the run's own.
          split: "" is `data.eval_split`.
          batch_size: images a batch.
          limit: at most so many images; 0 is all. CIDEr of fewer images is another figure.
          tokenizer: what cuts text into words, one of `caption_metrics.TOKENIZERS`.
          spice: when SPICE is tried, one of `caption_metrics.SPICE`. It takes minutes.
          protocol: one of `caption_metrics.PROTOCOLS`; in all but "coco" the two before do not
            matter.
        """

        data: str = ""
        split: str = ""
        batch_size: int = 128
        limit: int = 0
        tokenizer: str = "auto"
        spice: str = "no"
        protocol: str = "coco"

    def __init__(self, context: Context, options: Options):
        """Builds the evaluator.

        Raises:
          UserError: the learner writes no captions, the dataset has none, or nothing can be scored
            with these options.
        """
        config = context.config
        self._context, self._options = context, options
        self._dataset = options.data or parse_mixture(config.data.name)[0][0]
        self._split = options.split or config.data.eval_split
        self._source = context.source(options.split, options.data)
        if not self._source[0]["captions"]:
            raise UserError(
                f"evals: caption_scores compares with captions, and {self._dataset} has none; "
                "name another dataset or set data.fields."
            )
        caption_metrics.check_options(options.tokenizer, options.spice, options.protocol)
        self._captioning = Captioning(
            context,
            self._source,
            batch_size=options.batch_size,
            limit=options.limit or None,
            how=options,
        )

    def __call__(self, variables) -> Result:
        captions = dict(self._captioning(variables))
        # Only the first host needs Java, and all have the same figures.
        found = cluster.decided(None, lambda said: self._scored(captions))
        return Result(found["figures"], found["details"], (found["line"],))

    def _scored(self, captions: Mapping[int, str]) -> dict[str, Any]:
        """Returns the parts of the result as JSON."""
        kept = [self._kept(index, caption) for index, caption in captions.items()]
        scores = caption_metrics.score(
            dict(enumerate(entry["references"] for entry in kept)),
            dict(enumerate(entry["caption"] for entry in kept)),
            tokenizer=self._options.tokenizer,
            spice=self._options.spice,
            protocol=self._options.protocol,
            check=self._check,
        )
        counts = collections.Counter(captions.values())
        ((commonest, times),) = counts.most_common(1)
        figures = scores.metrics | {
            # Captioners are known to collapse to a few sentences without anybody noticing.
            "distinct_share": len(counts) / len(captions),
            "commonest_share": times / len(captions),
            "mean_words": float(np.mean([len(caption.split()) for caption in captions.values()])),
        }
        options = self._options
        evaluation = "COCO" if options.protocol == "coco" else options.protocol
        version = importlib.metadata.version("pycocoevalcap")
        details = {
            "protocol": f"{options.described}; {evaluation} evaluation by pycocoevalcap {version}",
            "dataset": self._dataset,
            "split": self._split,
            **scores.protocol(),
            "commonest": commonest,
            "captions": kept,
        }
        line = (
            f"{scores.images} images of {self._dataset} {self._split}, words by {scores.tokenizer}"
        )
        line += "".join(f"; {name} skipped: {why}" for name, why in scores.skipped.items())
        return {"figures": figures, "details": details, "line": line}

    def _kept(self, index: int, caption: str) -> dict[str, Any]:
        example = self._source[index]
        if not example["captions"]:
            raise UserError(
                f"evals: image {example['id']!r} of {self._dataset} has no captions to compare "
                "with; caption_scores needs some for each."
            )
        entry = {"image_id": example["id"], "caption": caption}
        return entry | {"references": list(example["captions"])}

    def _check(self) -> None:
        # A signal that ends the run may have ended Java with it.
        if self._context.stop():
            raise Interrupted
