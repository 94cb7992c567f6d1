"""Evaluators: what is measured of a learner, during training or after it.

An evaluator is a class with

  Options                     a frozen dataclass: its documented settings and defaults
  __init__(context, options)  builds what it needs once (see `Context`)
  __call__(variables)         measures the learner with these variables -> Result

A `Result` goes to metrics.jsonl, the console, TensorBoard and `evals/NAME/STEP.json`. To add an
evaluator, write its file and register it here; the loop need not know.
"""

import dataclasses
import importlib
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain.errors import UserError, did_you_mean

REGISTRY = {
    "loss": "cap_pretrain.evals.loss:Loss",
    "captions": "cap_pretrain.evals.captions:Captions",
    "caption_scores": "cap_pretrain.evals.caption_scores:CaptionScores",
    "scene_captions": "cap_pretrain.evals.scene_captions:SceneCaptions",
    "attention_mass": "cap_pretrain.evals.attention_mass:AttentionMass",
    "question_answers": "cap_pretrain.evals.question_answers:QuestionAnswers",
    "perplexity": "cap_pretrain.evals.perplexity:Perplexity",
    "zero_shot": "cap_pretrain.evals.zero_shot:ZeroShot",
    "retrieval": "cap_pretrain.evals.retrieval:Retrieval",
    "composition": "cap_pretrain.evals.composition:Composition",
    "linear_probe": "cap_pretrain.evals.probes.linear_probe:LinearProbe",
    "few_shot": "cap_pretrain.evals.probes.few_shot:FewShot",
    "knn": "cap_pretrain.evals.probes.knn:KNearestNeighbours",
    "accuracy": "cap_pretrain.evals.accuracy:Accuracy",
}


def evaluator_class(name: str) -> type:
    """Returns the class registered as `name`; raises UserError for an unknown name."""
    if name not in REGISTRY:
        raise UserError(f"evals: no evaluator {name!r}.{did_you_mean(name, REGISTRY)}")
    module, _, cls = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def defaults(name: str, **overrides: Any) -> ConfigDict:
    """Returns an entry of `config.evals`: the evaluator's name and its options.

    Besides the evaluator's own options, `when` is "always" or "end" (of the run only).
    """
    when = overrides.pop("when", "always")
    options = evaluator_class(name).Options(**overrides)
    return ConfigDict({"evaluator": name, "when": when, **dataclasses.asdict(options)}).lock()


def options(name: str, section: ConfigDict) -> Any:
    """Returns the `Options` that the entry `name` of `config.evals` describes."""
    fields = section.to_dict()
    if fields.pop("when") not in ("always", "end"):
        raise UserError(f"evals.{name}.when: {section.when!r} is neither 'always' nor 'end'.")
    return evaluator_class(fields.pop("evaluator")).Options(**fields)
