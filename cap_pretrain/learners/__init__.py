"""Learners: modules that own an image encoder and define how it is trained.

A learner is an `nnx.Module` class with

    Options                 frozen dataclass of its documented settings and their defaults
    reads                   the parts of a batch it reads, for example ("image", "text")
    encoder                 the part that is kept after pretraining, an `ImageEncoder`
    from_config(config, vocab_size, rngs)
                            classmethod that builds it
    loss(batch, key, train) -> (scalar loss, metrics: dict of scalars). The loss is a mean over
                            examples, so that gradient accumulation can average it over parts.

A learner whose loss compares the examples of a batch is a `contrastive.Contrastive` and implements

    embed(batch, key, train) -> a tree of arrays [B, ...] to compare
    contrast(embedded)       -> (scalar loss, metrics)

Evaluators and tools look for further methods, which `protocols` lists: `WritesCaptions`,
`ScoresTexts`, `EmbedsText`, `Attends`, `Classifies`, `Colorizes` and `Featurizes`.

`metrics` may contain "loss_weight", the weight of a part of a batch in gradient accumulation
(default: equal weights). A learner whose options depend on the training data implements

    settled(config, mixture) -> fields of `config.learner` to set at the start of a run; see
                            `inputs.completed`

`keeps_tokens_at` says where a learner allows `model.keep_tokens` to drop tokens, ("encoder",) by
default: () for one that needs all of them; see `models.tokens.PLACES`.

A pretext task, which learns from images alone, also has

    RECIPES                 its published settings: config fields and values by recipe name

To add a learner, write a module and register its class below. `configs/pretext.py` finds pretext
tasks by itself.
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
    "aimv2": "cap_pretrain.learners.aim:AIM",
    "recurrent": "cap_pretrain.learners.recurrent:Recurrent",
    "dual_encoder": "cap_pretrain.learners.dual_encoder:DualEncoder",
    "classifier": "cap_pretrain.learners.classifier:Classifier",
    "rotation": "cap_pretrain.learners.rotation:Rotation",
    "jigsaw": "cap_pretrain.learners.jigsaw:Jigsaw",
    "colorization": "cap_pretrain.learners.colorization:Colorization",
    "distillation": "cap_pretrain.learners.distillation:Distillation",
    "masked_patches": "cap_pretrain.learners.masked_patches:MaskedPatches",
    "simclr": "cap_pretrain.learners.simclr:SimCLR",
    "encoder": "cap_pretrain.learners.encoder:Encoder",
    "pretrained": "cap_pretrain.learners.encoder:Pretrained",
}


# Former names of recipes, which are still accepted.
RECIPE_ALIASES = {"seed000": "elhagry", "seed002": "demidov"}


def learner_class(name: str) -> Any:
    """Return the class registered as `name`.

    Raises:
        UserError: The name is unknown.
    """
    if name not in REGISTRY:
        raise UserError(f"learner.name: no learner {name!r}.{did_you_mean(name, REGISTRY)}")
    module, _, cls = REGISTRY[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def pretexts() -> dict[str, Any]:
    """Return the registered pretext tasks, those with RECIPES, by name."""
    classes = {name: learner_class(name) for name in REGISTRY}
    return {name: cls for name, cls in classes.items() if hasattr(cls, "RECIPES")}


def defaults(name: str, **overrides: Any) -> ConfigDict:
    """Return the `learner` section of a config: the learner's name and its options."""
    options = learner_class(name).Options(**overrides)
    return ConfigDict({"name": name, **dataclasses.asdict(options)}).lock()


def options(config: ConfigDict) -> Any:
    """Return the `Options` of the learner that `config.learner` describes."""
    fields = config.learner.to_dict()
    return learner_class(fields.pop("name")).Options(**fields)


def build(config: ConfigDict, vocab_size: int, key: jax.Array) -> nnx.Module:
    """Build the learner of `config`, with parameters initialized from `key`.

    The encoder, and every BatchNorm in it, is `frozen` if `optim.lr_rules` freeze all of its
    parameters. A frozen module computes as in evaluation during training, too: without dropout,
    and without using or updating batch statistics.

    Args:
        config: The config of the run.
        vocab_size: Number of tokens; 0 for learners that read no text.
        key: Random key for the parameters.

    Raises:
        UserError: The config is invalid.
    """
    cls = learner_class(config.learner.name)
    if config.model.name == STORED and hasattr(cls, "RECIPES"):
        raise UserError(
            f"model.name: {config.learner.name} learns from images, not from {STORED} features; "
            "choose an encoder and a dataset of images."
        )
    learner = cls.from_config(config, vocab_size, nnx.Rngs(params=key))
    for path, module in nnx.iter_modules(learner):
        if isinstance(module, (ImageEncoder, BatchNorm)):
            weights: dict[Any, Any] = nnx.to_pure_dict(nnx.state(module, nnx.Param))
            for name in reversed(path):
                weights = {name: weights}
            module.frozen = optimizers.is_frozen(config.optim, weights)
    return learner
