"""Learners: modules that own an encoder and say how to learn.

A learner is an `nnx.Module` class with

  Options                              a frozen dataclass: its documented settings and defaults
  reads                                the parts of a batch it learns from, as ("image", "text")
  encoder                              the part that is kept, an `ImageEncoder`
  from_config(config, vocab_size, rngs) classmethod that builds it
  loss(batch, key, train)              -> (scalar loss, metrics: dict of scalars), a mean over
                                       examples, so that of a batch in parts it is that of theirs

or, if the loss compares examples with each other, as a `contrastive.Contrastive`

  embed(batch, key, train)             -> what is compared, a tree of arrays [B, …]
  contrast(embedded)                   -> (scalar loss, metrics)

and, for the evaluators and tools that look for it, any of the methods in `protocols`:
`WritesCaptions`, `ScoresTexts`, `EmbedsText`, `Attends`, `Classifies`, `Colorizes`, `Featurizes`.

`metrics` may hold "loss_weight": what a part of a batch weighs against another (default: equal).
What else of its options the training data are to settle, as a run begins, is told by

  settled(config, mixture)             -> fields of `config.learner`; see `inputs.completed`

A pretext, which learns from images alone, has besides

  RECIPES                              its settings as published: fields of the config by recipe

To add a learner, write its file and register it here; `configs/pretext.py` then knows a pretext.
"""

import dataclasses
import importlib
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models.convnet import BatchNorm
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.sizes import STORED
from cap_pretrain.optim import optimizers

REGISTRY = {
    "captioner": "cap_pretrain.learners.captioner:Captioner",
    "recurrent": "cap_pretrain.learners.recurrent:Recurrent",
    "dual_encoder": "cap_pretrain.learners.dual_encoder:DualEncoder",
    "classifier": "cap_pretrain.learners.classifier:Classifier",
    "rotation": "cap_pretrain.learners.rotation:Rotation",
    "jigsaw": "cap_pretrain.learners.jigsaw:Jigsaw",
    "colorization": "cap_pretrain.learners.colorization:Colorization",
    "simclr": "cap_pretrain.learners.simclr:SimCLR",
    "encoder": "cap_pretrain.learners.encoder:Encoder",
    "pretrained": "cap_pretrain.learners.encoder:Pretrained",
}


def learner_class(name: str) -> type[nnx.Module]:
    """Returns the class registered as `name`; raises UserError for an unknown name."""
    if name not in REGISTRY:
        raise UserError(f"learner.name: no learner {name!r}.{did_you_mean(name, REGISTRY)}")
    module, _, cls = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def pretexts() -> dict[str, type[nnx.Module]]:
    """Returns the registered learners that have RECIPES, by name."""
    classes = {name: learner_class(name) for name in REGISTRY}
    return {name: cls for name, cls in classes.items() if hasattr(cls, "RECIPES")}


def defaults(name: str, **overrides: Any) -> ConfigDict:
    """Returns the `learner` section of a config: the learner's name and its options."""
    options = learner_class(name).Options(**overrides)
    return ConfigDict({"name": name, **dataclasses.asdict(options)}).lock()


def options(config: ConfigDict) -> Any:
    """Returns the `Options` of the learner that `config.learner` describes."""
    fields = config.learner.to_dict()
    return learner_class(fields.pop("name")).Options(**fields)


def build(config: ConfigDict, vocab_size: int, key: jax.Array) -> nnx.Module:
    """Builds the learner of `config`, with fresh parameters drawn from `key`.

    Its encoder, and every BatchNorm in it, is told whether `optim.lr_rules` leave all of its
    parameters as they are. If so it is `frozen`, and computes as in evaluation in training, too:
    nothing is dropped, and the statistics are those it came with and do not move.

    Raises:
      UserError: the config cannot be built.
    """
    cls = learner_class(config.learner.name)
    if config.model.name == STORED and hasattr(cls, "RECIPES"):
        raise UserError(
            f"model.name: {STORED} features are no images, which {config.learner.name} learns "
            "from; name an encoder and a dataset of images."
        )
    learner = cls.from_config(config, vocab_size, nnx.Rngs(params=key))
    for path, module in nnx.iter_modules(learner):
        if isinstance(module, (ImageEncoder, BatchNorm)):
            weights = nnx.to_pure_dict(nnx.state(module, nnx.Param))
            for name in reversed(path):
                weights = {name: weights}
            module.frozen = optimizers.is_frozen(config.optim, weights)
    return learner
