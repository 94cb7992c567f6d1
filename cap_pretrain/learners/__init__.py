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
`ScoresTexts`, `Locates`, `EmbedsText`, `Attends`, `Classifies`, `Colorizes`, `Featurizes`, ….

`metrics` may contain "loss_weight", the weight of a part of a batch in gradient accumulation
(default: equal weights), and NAME_weight where the metric NAME has another. Evaluators weigh
batches in the same way. A learner whose options depend on the training data implements

    settled(config, mixture) -> fields of `config.learner` to set at the start of a run; see
                            `inputs.completed`

`keeps_tokens_at` says where `model.keep_tokens` drops tokens of a learner, ("encoder",) by default;
see `models.tokens.PLACES`. () is for one that needs all of them, and None for a part to which the
field does not apply, and which may be trained beside others to which it does.

`layouts` are the values of `data.layout` that a learner can read, ("square",) by default. One that
reads "naflex" leaves out the padding of an encoder's tokens; see `models.native`. Subclasses
inherit it, so one that reads the tokens in another way sets it to ("square",).

One whose form depends on its options, as that of `joint`, has the classmethods

    reads_of(options)       what it reads of a batch, in place of `reads`
    members(config)         the parts that it trains, each a learner that evaluators can use; see
                            `able`
    like(section)           the default of a section of `config.learner` with the same parts

A learner that is not the same during a whole run has the classmethods

    changes(config)         fields that change during a run, (share of the run, {field: value from
                            there on}); parameters must not depend on them. See `training.phases`
    idle(config)            prefixes of the paths of parameters that have no loss and stay as they
                            are, also without weight decay

A pretext task, which learns from images alone, also has

    RECIPES                 its published settings: config fields and values by recipe name

To add a learner, write a module and register its class below. `configs/pretext.py` finds pretext
tasks by itself.
"""

import dataclasses
import importlib
from typing import Any, NamedTuple

import jax
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.learners.protocols import EmbedsText
from cap_pretrain.models.convnet import BatchNorm
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.sizes import STORED
from cap_pretrain.optim import optimizers

REGISTRY = {
    "captioner": "cap_pretrain.learners.captioner:Captioner",
    "locca": "cap_pretrain.learners.locca:LocCa",
    "aimv2": "cap_pretrain.learners.aim:AIM",
    "coca": "cap_pretrain.learners.coca:CoCa",
    "recurrent": "cap_pretrain.learners.recurrent:Recurrent",
    "dual_encoder": "cap_pretrain.learners.dual_encoder:DualEncoder",
    "joint": "cap_pretrain.learners.joint:Joint",
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

PROGRESS = "progress"
"""The part of a batch that says which share of the run is done, float32 [B], in training only."""


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


def defaults_like(section: dict[str, Any]) -> ConfigDict:
    """Return the default of a section `learner` with the same learner and the same parts.

    Raises UserError if a name is unknown.
    """
    name = str(section.get("name", ""))
    cls = learner_class(name)
    return cls.like(section) if hasattr(cls, "like") else defaults(name)


def options(config: ConfigDict) -> Any:
    """Return the `Options` of the learner that `config.learner` describes."""
    return options_of(config.learner.to_dict())


def options_of(section: dict[str, Any]) -> Any:
    """Return the `Options` of the learner that a section `learner` describes.

    Raises UserError if the learner has other fields, or a value is not allowed.
    """
    given = {field: value for field, value in section.items() if field != "name"}
    kind = learner_class(section["name"]).Options
    known = {field.name for field in dataclasses.fields(kind)}
    for field in given:
        if field not in known:
            raise UserError(
                f"learner.{field}: is no option of {section['name']}; choose a learner by the "
                "config file and its arguments, not by learner.name."
            )
    return kind(**given)


def reads(config: ConfigDict) -> tuple[str, ...]:
    """Return the parts of a batch that the learner of a config reads of the data."""
    return tuple(name for name in _reads(config) if name != PROGRESS)


def needs(config: ConfigDict) -> list[tuple[str, ...]]:
    """Return what each learner among the members of a config reads of the data, each once."""
    return list(dict.fromkeys(reads(member.config) for member in members(config)))


def idle(config: ConfigDict) -> tuple[str, ...]:
    """Return prefixes of the paths of parameters that a learner does not train at all."""
    cls = learner_class(config.learner.name)
    return cls.idle(config) if hasattr(cls, "idle") else ()


def reads_progress(config: ConfigDict) -> bool:
    """Return whether the learner reads which share of the run is done; see `training.step`."""
    return PROGRESS in _reads(config)


def _reads(config: ConfigDict) -> tuple[str, ...]:
    cls = learner_class(config.learner.name)
    return cls.reads_of(options(config)) if hasattr(cls, "reads_of") else cls.reads


def with_learner(config: ConfigDict, section: ConfigDict) -> ConfigDict:
    """Return a config with another section `learner`."""
    own = config.copy_and_resolve_references()
    with own.unlocked():
        own.learner = section
    return own


class Member(NamedTuple):
    """A learner, or a part of one: its name ("" is the whole), class, and a config that fits.

    Parts of parts have names such as "coca/captions".
    """

    name: str
    kind: type
    config: ConfigDict

    def of(self, learner: Any) -> Any:
        """Return the member of a learner of the config that it was found for."""
        for name in filter(None, self.name.split("/")):
            learner = learner.parts[name]
        return learner


def members(config: ConfigDict, kind: type | None = None) -> list[Member]:
    """Return the learner of a config, which is a `kind` if given, and its parts, if it has any."""
    kind = kind or learner_class(config.learner.name)
    found = [Member("", kind, config)]
    return found + kind.members(config) if hasattr(kind, "members") else found


def able(
    config: ConfigDict, protocol: type, part: str = "", kind: type | None = None
) -> Member | None:
    """Return what has the methods of a protocol: the learner of a config or a part of it, or None.

    The learner itself comes first, then parts that embed texts without an image, then the others in
    the order of their names. A `part` asks for this one. Raises UserError if it is unknown, or no
    part that the config trains.
    """
    found = members(config, kind)
    if part:
        names = [member.name for member in found[1:]]
        if part not in names:
            raise UserError(
                f"part: {part!r} is no part that this {config.learner.name} trains."
                f"{did_you_mean(part, names)}"
            )
        found = [member for member in found if member.name == part]
    fit = [member for member in found if issubclass(member.kind, protocol)]
    return min(fit, key=lambda m: bool(m.name) + (not issubclass(m.kind, EmbedsText)), default=None)


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
