"""Captions of a split, scored against references by the COCO evaluation."""

import collections
import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import numpy as np

from cap_pretrain.data.sources.base import parse_mixture
from cap_pretrain.distributed import cluster
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import BatchOptions, Context, Interrupted, PartOptions, Result
from cap_pretrain.evals.fit import Work
from cap_pretrain.evals.inference.captioning import Caption, Captioning
from cap_pretrain.evals.metrics import caption_metrics
from cap_pretrain.models.decoding import Decoding


class CaptionScores:
    """BLEU, METEOR, ROUGE-L, CIDEr-D and SPICE of a captioner's captions.

    The result has captions and references, so that tools/score_captions.py can score them again,
    for instance on a machine that has Java.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(PartOptions, BatchOptions, Decoding):
        """Settings besides decoding; CIDEr values with different `limit` are not comparable."""

        tokenizer: str = "auto"  # one of `caption_metrics.TOKENIZERS`
        spice: str = "no"  # one of `caption_metrics.SPICE`; it takes minutes
        protocol: str = "coco"  # one of `PROTOCOLS`; only "coco" uses the above

    def __init__(self, context: Context, options: Options):
        """Build the evaluator.

        Raises UserError if the learner cannot write captions, the dataset has none, an option is
        invalid, or pycocoevalcap is not installed.
        """
        config = context.config
        self._context, self._options = context, options
        self._dataset = options.data or parse_mixture(config.data.name)[0][0]
        self._split = options.split or config.data.eval_split
        self._source = context.source(options.split, options.data)
        if not self._source[0]["captions"]:
            raise UserError(
                f"evals: caption_scores needs reference captions, and {self._dataset} has none; "
                "name another dataset or set data.fields."
            )
        wanted = (options.tokenizer, options.spice, options.protocol)
        # Host 0 scores for all: only it needs the packages and Java.
        cluster.decided(None, lambda _: caption_metrics.check_options(*wanted))
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
        """Caption every image and score the captions; raises Interrupted if the run is stopping.

        Raises UserError if an image has no references or a requested PTBTokenizer cannot run.
        """
        captions = dict(self._captioning.scored(variables))
        found = cluster.decided(None, lambda _: self._score(captions))
        return Result(found["metrics"], found["details"], (found["line"],))

    def _score(self, written: Mapping[int, list[Caption]]) -> dict[str, Any]:
        """Return the parts of the result as JSON."""
        kept = [self._entry(index, captions) for index, captions in written.items()]
        captions = [entry["caption"] for entry in kept]
        scores = caption_metrics.score(
            dict(enumerate(entry["references"] for entry in kept)),
            dict(enumerate(entry["caption"] for entry in kept)),
            tokenizer=self._options.tokenizer,
            spice=self._options.spice,
            protocol=self._options.protocol,
            check=self._check,
        )
        counts = collections.Counter(captions)
        ((commonest, times),) = counts.most_common(1)
        metrics = scores.metrics | {
            # These reveal a captioner that has collapsed to a few sentences.
            "distinct_share": len(counts) / len(captions),
            "commonest_share": times / len(captions),
            "mean_words": float(np.mean([len(caption.split()) for caption in captions])),
        }
        options = self._options
        protocol = caption_metrics.current_name(options.protocol)
        evaluation = "COCO" if protocol == "coco" else protocol
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
        line += "".join(f"; {' '.join(note.split())}" for note in scores.notes())
        return {"metrics": metrics, "details": details, "line": line}

    def _entry(self, index: int, captions: list[Caption]) -> dict[str, Any]:
        """Return the id, captions and references of an image."""
        example = self._source[index]
        if not example["captions"]:
            raise UserError(
                f"evals: caption_scores: image {example['id']!r} of {self._dataset} has no "
                "reference captions; every image needs one or more."
            )
        entry = {"image_id": example["id"], "caption": captions[0].text}
        entry |= {"references": list(example["captions"])}
        return entry | self._captioning.recorded(captions)

    def _check(self) -> None:
        """Raise Interrupted if the run is stopping; the signal may have ended Java, too."""
        if self._context.stop():
            raise Interrupted
