"""The checks of a configuration, and which fields may change while a run is resumed."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain import evals, files, learners
from cap_pretrain.config import fields, get, trains
from cap_pretrain.data import resolution
from cap_pretrain.data.origins import Origins
from cap_pretrain.data.regions import MAX_REGIONS, check_augmentation
from cap_pretrain.data.sources.base import parse_mixture
from cap_pretrain.data.text import tokenizers, words
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models import build, positions, tokens
from cap_pretrain.models.encoder import COLOURS
from cap_pretrain.models.layers import REMAT_POLICIES
from cap_pretrain.models.mlp import ACTIVATIONS, NORMS
from cap_pretrain.models.narrowing import narrowed
from cap_pretrain.models.sizes import STORED, Size
from cap_pretrain.naflex import LAYOUTS, SQUARE
from cap_pretrain.optim import optimizers, schedule_free
from cap_pretrain.optim.muon import Muon
from cap_pretrain.optim.mup import Mup
from cap_pretrain.optim.plateau import Plateau
from cap_pretrain.telemetry import profiler, trackers
from cap_pretrain.untrusted import parsing

DURATIONS = ("_steps", "_examples", "_epochs", "_share")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Field:
    """What is known of a field besides its default.

    A `free` field may change between one start of a run and the next: it affects where and how fast
    the run computes, or what is logged and kept, but not what is learned.
    """

    choices: tuple[str, ...] = ()  # accepted values; empty accepts any
    minimum: int | None = None  # smallest accepted value; None accepts any
    maximum: int = 2**31 - 1  # largest accepted integer; devices count in 32 bits
    free: bool = False


FIELDS = {
    "accumulate": Field(minimum=1),
    "batch_size": Field(minimum=1),
    "checkpoint.best_mode": Field(("min", "max")),
    "checkpoint.every_minutes": Field(minimum=0),
    "checkpoint.local_every_steps": Field(minimum=0),
    "compile_cache": Field(free=True),
    "data.block": Field(minimum=1),
    "data.cache": Field(free=True),
    "data.cache_gb": Field(minimum=0),
    "data.class_max": Field(minimum=0),
    "data.class_min": Field(minimum=0),
    "data.crop": Field(("none", "random", "window")),
    "data.dir": Field(free=True),
    "data.eval_split": Field(free=True),
    "data.held_out": Field(minimum=-1),
    "data.lanes": Field(minimum=0),
    "data.layout": Field(LAYOUTS),
    "data.max_broken": Field(minimum=0, free=True),
    "data.order": Field(("auto", "global", "blocks")),
    "data.workers": Field(minimum=0, free=True),
    "data.regions": Field(minimum=1, maximum=MAX_REGIONS),
    "deterministic": Field(free=True),
    "dtype": Field(DTYPES),
    "learner.ring": Field(free=True),
    "log.spikes": Field(minimum=0),
    "model.activation": Field(tuple(ACTIVATIONS)),
    "model.norm": Field(tuple(NORMS)),
    "model.positions": Field(positions.KINDS),
    "model.attention": Field(("auto", "xla", "cudnn", "recompute", "keep"), free=True),
    "model.colours": Field(COLOURS),
    "model.final_norm": Field(("tokens", "pooled")),
    "model.keep_tokens_at": Field(tokens.PLACES),
    "model.logit_chunks": Field(minimum=1, free=True),
    "model.pool": Field(("gap", "map", "class")),
    "model.registers": Field(minimum=0),
    "model.remat": Field(("auto", *REMAT_POLICIES), free=True),
    "model.unroll": Field(minimum=0, free=True),
    "optim.clip_norm": Field(minimum=0),
    "optim.clip_value": Field(minimum=0),
    "optim.decay": Field(tuple(optimizers.DECAYS)),
    "optim.lr": Field(minimum=0),
    "optim.lr_batch": Field(minimum=0),
    "optim.moment_dtype": Field(("", "float32", "bfloat16")),
    "optim.name": Field(tuple(optimizers.OPTIMIZERS)),
    "optim.skip_bad_steps": Field(minimum=0),
    "optim.weight_decay": Field(minimum=0),
    "seed": Field(minimum=0, maximum=2**63 - 1),
    "text.kind": Field(("sentencepiece", "words")),
    "text.length": Field(minimum=1),
    "text.vocab_size": Field(minimum=1, maximum=tokenizers.MAX_VOCABULARY),
}
for _size in dataclasses.fields(Size):
    FIELDS[f"model.{_size.name}"] = FIELDS[f"model.decoder_{_size.name}"] = Field(minimum=0)

# Sections and fields that may change between one start of a run and the next.
FREE = (
    *("checkpoint", "log", "eval", "evals", "mesh"),
    *(name for name, field in FIELDS.items() if field.free),
)


def validate(config: ConfigDict, *, tokenizer: bool = False) -> None:
    """Check everything that can be checked before anything is built; raise UserError.

    `tokenizer`: the run has its tokenizer already, so that the file text.tokenizer is not needed.
    """
    for name, value in fields(config.to_dict()).items():
        _check_number(name, value)
    for name, field in FIELDS.items():
        if name != "learner.ring":  # of one learner only, whose Options check it
            _check_field(name, field, get(config, name))
    build.check(config)
    if config.batch_size % config.accumulate:
        raise UserError(
            f"accumulate: {config.accumulate} parts do not divide batch_size={config.batch_size}."
        )
    if not trains(config) and not (config.encoder and len(config.evals)):
        raise UserError("total_steps: the length of the run is not set; give --config.total_steps.")
    for name in ("optim.ema", "model.dropout", "model.stochastic_depth"):
        if not 0 <= get(config, name) < 1:
            raise UserError(f"{name}: {get(config, name)} is not in [0, 1).")
    given = config.text.tokenizer
    with parsing("text.tokenizer"):
        there = tokenizer or not given or files.place(given).is_file()
    if not there:
        raise UserError(f"text.tokenizer: there is no file {given!r}.")
    _check_average(config)
    optimizers.check(config.optim)
    words.Rules(**config.text.words)
    Origins.of(config.data)
    Muon(**config.optim.muon)
    Mup(**config.optim.mup).check(config.optim.name)
    if config.optim.mup.base_width:
        narrowed(config)
    profiler.parse(config.log.profile_steps)
    trackers.check(config.log.trackers)
    _check_rules(config)
    _check_order(config)
    _check_sizes(config)
    _check_learner(config)
    _check_evals(config)


def _check_number(name: str, value: Any) -> None:
    """Refuse numbers that no field takes: not finite, beyond 64 bits, negative durations."""
    if not isinstance(value, int | float):
        return
    if not -(2**63) <= value < 2**63:  # NaN, too
        raise UserError(f"{name}: {value} is not a finite number below 2^63.")
    if value < 0 and name.endswith(DURATIONS):
        raise UserError(f"{name}: {value} must not be negative.")


def _check_rules(config: ConfigDict) -> None:
    for name in ("lr_rules", "decay_rules"):
        for rule in config.optim[name]:
            pair = isinstance(rule, tuple | list) and len(rule) == 2
            if not (pair and isinstance(rule[0], str) and isinstance(rule[1], int | float)):
                raise UserError(f"optim.{name}: {rule!r} is not a pair (pattern, number).")
            _check_number(f"optim.{name}", rule[1])


def _check_average(config: ConfigDict) -> None:
    """Refuse what schedule-free learning, whose average is another one, cannot be combined with."""
    if config.optim.name != schedule_free.NAME:
        return
    for field in ("optim.ema", "plateau.figure"):
        if get(config, field):
            raise UserError(
                f"{field}: optim.name=schedule_free has an average that depends on all rates; "
                f"leave {field} at its default."
            )


def _check_field(name: str, field: Field, value: Any) -> None:
    if field.choices and value not in field.choices:
        raise UserError(f"{name}: {value!r} is unknown.{did_you_mean(value, field.choices)}")
    if field.minimum is not None and value < field.minimum:
        bound = "must not be negative" if not field.minimum else f"must be at least {field.minimum}"
        raise UserError(f"{name}: {value} {bound}.")
    if isinstance(value, int) and value > field.maximum:
        raise UserError(f"{name}: {value} must be at most {field.maximum}.")


def _check_order(config: ConfigDict) -> None:
    """Check the order of examples against the batch."""
    data = config.data
    if not trains(config):
        return
    if not data.cache_gb:
        raise UserError("data.cache_gb: 0 GB hold no data; give more.")
    if data.order != "global" and data.lanes and config.batch_size % data.lanes:
        raise UserError(
            f"data.lanes: {data.lanes} lanes do not divide batch_size={config.batch_size}; choose "
            "a divisor, or 0 for the largest one up to 256."
        )
    if data.order == "blocks" and data.buckets:
        raise UserError(
            "data.order: blocks cannot be combined with data.buckets, whose batches need all "
            "captions of a length; set data.order=global or data.buckets=False."
        )


def _check_sizes(config: ConfigDict) -> None:
    """Check the sizes of images before `data.image_size`."""
    resolution.check(config)
    for side, _ in resolution.first_sizes(config):
        if config.model.name == STORED:
            raise UserError(
                f"{resolution.FIELD}: {config.data.first_sizes!r} needs images, but model.name is "
                f"{STORED}; set it to ''."
            )
        build.check_side(config.model, side, resolution.FIELD)
        build.check_budget(config, side, resolution.FIELD)


def _check_learner(config: ConfigDict) -> None:
    """Check the learner's options against the data and the encoder."""
    members = parse_mixture(config.data.name)
    learners.options(config)
    _check_layout(config)
    _check_kept_tokens(config)
    if hasattr(cls := learners.learner_class(config.learner.name), "changes"):
        cls.changes(config)
    if config.data.buckets and (len(members) > 1 or "text" not in learners.reads(config)):
        what = f"the mixture {config.data.name}" if len(members) > 1 else config.learner.name
        raise UserError(
            f"data.buckets: works with the captions of one dataset, not with {what}; set "
            "data.buckets=False."
        )
    if "boxes" in learners.reads(config):
        check_augmentation(config.data.crop, config.data.flip)
        if config.data.buckets:
            raise UserError("data.buckets: has no regions of images; set data.buckets=False.")
    frozen = [rule[0] for rule in config.optim.lr_rules if tuple(rule[1:]) == (0,)]
    has_encoder = config.encoder or config.model.name == STORED
    if not has_encoder and any(rule.startswith("encoder/") for rule in frozen):
        raise UserError(
            "encoder: is empty, but optim.lr_rules freezes it; give --config.encoder=PATH."
        )


def _check_layout(config: ConfigDict) -> None:
    """Check that the learner can read images in the layout `data.layout`."""
    layout = config.data.layout
    for member in learners.members(config):
        if layout not in getattr(member.kind, "layouts", (SQUARE,)):
            named = member.config.learner.name + (f" ({member.name})" if member.name else "")
            raise UserError(f"data.layout: {layout!r} does not work with {named}; use {SQUARE!r}.")


def _check_kept_tokens(config: ConfigDict) -> None:
    """Check that the learner can do without the tokens that `model.keep_tokens` drops."""
    name, place = config.learner.name, config.model.keep_tokens_at
    whole, *parts = (member.kind for member in learners.members(config))
    each = [getattr(kind, "keeps_tokens_at", (tokens.ENCODER,)) for kind in parts or [whole]]
    places = () if () in each else tuple(dict.fromkeys(p for own in each for p in own or ()))
    if config.model.keep_tokens == 1 or place in places:
        return
    if not places:
        raise UserError(
            f"model.keep_tokens: {config.model.keep_tokens} drops tokens, but {name} needs all; "
            "set it to 1."
        )
    raise UserError(
        f"model.keep_tokens_at: {place!r} does not work with {name}; set it to "
        f"{' or '.join(places)}."
    )


def _check_evals(config: ConfigDict) -> None:
    """Check the evaluators' options and the metrics that other fields name."""
    for name, section in config.evals.items():
        evals.options(name, section)
    Plateau.of(config)
    if files.is_url(config.checkpoint.local):
        raise UserError(
            f"checkpoint.local: {config.checkpoint.local!r} is a URL; give a folder on a disk of "
            "each host."
        )
    best = config.checkpoint.best
    if best and best.partition("/")[0] not in config.evals:
        raise UserError(
            f"checkpoint.best: {best!r} is not a metric of an evaluator of this config; write "
            f"EVALUATOR/METRIC.{did_you_mean(best.partition('/')[0], config.evals)}"
        )
