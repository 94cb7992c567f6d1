"""Evaluators, which measure a learner during training or after it.

To add one, write a file here with a class that has the members of `base.Evaluator`: `Options`, a
nested frozen dataclass of documented settings with defaults; `__init__(context, options)`, which
checks all that evaluations need; and `__call__(variables)`, which returns a `base.Result`.
Register it in `REGISTRY` under the name that `config.evals` uses. The training loop needs no
change: a result is logged to metrics.jsonl, the console and TensorBoard, and written to
`evals/NAME/STEP.json`.

The evaluators are the classes in `REGISTRY`, one per file, here and in `probes/`. The other files:

    base.py     the interface (Evaluator, Context, Result) and common options
    suite.py    runs the evaluators of a run and writes their results
    inference/  runs a learner over a dataset: captions, scores of texts, outputs, attention
    metrics/    computes metrics from scores, captions or answers
    probes/     the four probes, and the features, splits and solvers that they share
"""

import dataclasses
import importlib
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain.errors import UserError, did_you_mean

# Name in `config.evals` -> module:class.
REGISTRY = {
    "loss": "cap_pretrain.evals.loss:Loss",
    "captions": "cap_pretrain.evals.captions:Captions",
    "caption_scores": "cap_pretrain.evals.caption_scores:CaptionScores",
    "scene_captions": "cap_pretrain.evals.scene_captions:SceneCaptions",
    "attention_mass": "cap_pretrain.evals.attention_mass:AttentionMass",
    "question_answers": "cap_pretrain.evals.question_answers:QuestionAnswers",
    "referring": "cap_pretrain.evals.referring:Referring",
    "perplexity": "cap_pretrain.evals.perplexity:Perplexity",
    "zero_shot": "cap_pretrain.evals.zero_shot:ZeroShot",
    "retrieval": "cap_pretrain.evals.retrieval:Retrieval",
    "composition": "cap_pretrain.evals.composition:Composition",
    "linear_probe": "cap_pretrain.evals.probes.linear_probe:LinearProbe",
    "map_probe": "cap_pretrain.evals.probes.map_probe:MapProbe",
    "few_shot": "cap_pretrain.evals.probes.few_shot:FewShot",
    "knn": "cap_pretrain.evals.probes.knn:KNearestNeighbours",
    "accuracy": "cap_pretrain.evals.accuracy:Accuracy",
}

_POSITIVE = ("batch_size", "count", "pairs")  # other numbers may be 0, which means all or none


def evaluator_class(name: str) -> Any:
    """Return the `base.Evaluator` registered as `name`; raises UserError if there is none."""
    if name not in REGISTRY:
        raise UserError(f"evals: no evaluator {name!r}.{did_you_mean(name, REGISTRY)}")
    module, _, cls = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def defaults(name: str, **overrides: Any) -> ConfigDict:
    """Return an entry of `config.evals`: the evaluator's name and its options.

    `overrides` are options, or `when`, "always" or "end" (of the run only).
    """
    when = overrides.pop("when", "always")
    options = evaluator_class(name).Options(**overrides)
    return ConfigDict({"evaluator": name, "when": when, **dataclasses.asdict(options)}).lock()


def options(name: str, section: ConfigDict) -> Any:
    """Return the `Options` that entry `name` of `config.evals` describes; may raise UserError."""
    fields = section.to_dict()
    if fields.pop("when") not in ("always", "end"):
        raise UserError(f"evals.{name}.when: {section.when!r} is neither 'always' nor 'end'.")
    for field, value in fields.items():
        least = int(field in _POSITIVE)
        if type(value) is int and value < least:
            raise UserError(f"evals.{name}.{field}: {value} must be at least {least}.")
    return evaluator_class(fields.pop("evaluator")).Options(**fields)
