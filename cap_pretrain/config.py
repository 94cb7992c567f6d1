"""The one default configuration, every field documented, and what makes a configuration valid.

A config file in `configs/` starts from `default()` and says only what differs. The default is
locked: a field that does not exist cannot be set.

Durations (`total`, `optim.warmup`, `optim.cooldown`, `checkpoint.every`, `eval.every`, `log.every`)
come as `…_steps`, `…_examples`, `…_epochs` or `…_share` (of the whole run; not for `total`). The
first of these that is set counts, in that order, so `--config.total_steps=100` shortens any run,
however its file gives the duration.
"""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

from ml_collections import ConfigDict

from cap_pretrain import evals, learners
from cap_pretrain.data.scenes.source import ScenesOptions
from cap_pretrain.data.sources.base import DEFAULT_FIELDS, parse_mixture
from cap_pretrain.data.text import words
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models import build
from cap_pretrain.models.encoder import COLOURS
from cap_pretrain.models.layers import ACTIVATIONS, REMAT_POLICIES
from cap_pretrain.models.sizes import STORED, Size
from cap_pretrain.optim import optimizers
from cap_pretrain.optim.plateau import Plateau

DTYPES = ("auto", "float32", "bfloat16", "float16")
CHOICES = {
    "dtype": DTYPES,
    "model.pool": ("gap", "map", "class"),
    "model.final_norm": ("tokens", "pooled"),
    "model.activation": tuple(ACTIVATIONS),
    "model.colours": COLOURS,
    "model.attention": ("auto", "xla", "cudnn", "recompute"),
    "model.remat": ("auto", *REMAT_POLICIES),
    "data.crop": ("none", "random", "window"),
    "text.kind": ("sentencepiece", "words"),
    "checkpoint.best_mode": ("min", "max"),
    "optim.name": tuple(optimizers.OPTIMIZERS),
    "optim.decay": tuple(optimizers.DECAYS),
    "optim.moment_dtype": ("", "float32", "bfloat16"),
}

AT_LEAST_ONE = ("batch_size", "accumulate", "text.length", "text.vocab_size", "model.logit_chunks")
NOT_NEGATIVE = (
    *("optim.lr", "optim.lr_batch", "optim.weight_decay", "optim.clip_norm", "optim.clip_value"),
    *("optim.skip_bad_steps", "data.workers", "checkpoint.every_minutes", "log.spikes"),
    *("data.class_min", "data.class_max", "data.max_broken", "model.unroll"),
    *(f"model.{whose}{n.name}" for whose in ("", "decoder_") for n in dataclasses.fields(Size)),
)

# Sections and fields that may differ from one start of a run to the next. They say where and how
# fast it runs and what is told and kept of it, not what is learned.
FREE = (
    *("checkpoint", "log", "eval", "evals", "mesh", "deterministic", "data.workers", "data.dir"),
    *("data.cache", "data.max_broken"),
    *("data.eval_split", "model.attention", "model.remat", "model.unroll", "model.logit_chunks"),
    "learner.ring",
)


def default() -> ConfigDict:
    """Returns the default configuration: the recipe of Cap B/16 (Tschannen et al. 2023)."""
    c = ConfigDict()
    # Every random choice of a run follows from this number.
    c.seed = 0
    # Length of the run. The authors' public config: 366,500 steps of 8192, 3.0B examples.
    c.total_steps = 0
    c.total_examples = 0
    c.total_epochs = 0.0
    # Examples a step, over all devices and hosts.
    c.batch_size = 8192
    # Parts in which the gradient of a batch is computed, one after the other, to save memory. It is
    # that of the whole batch, also where examples are compared with each other: they are then all
    # embedded before any is learned from, so twice. But BatchNorm normalises each part by itself.
    c.accumulate = 1
    # Of activations; parameters, softmax and loss are float32. "auto": bfloat16, on CPU float32.
    c.dtype = "auto"
    # Bit for bit the same result on every run of the same program, on NVIDIA GPUs too, where it
    # costs speed. On CPU and TPU it is so anyway.
    c.deterministic = False
    # What to begin with: a workdir (its newest checkpoint, or WORKDIR/checkpoints/STEP), an
    # exported encoder, or one of another ecosystem (see convert). Its weights, `model` fields and
    # image size are taken over.
    c.encoder = ""

    c.model = ConfigDict()
    # A ViT's size and patch: mu, Ti, S, M, B, L, So400m, H, g with /PATCH, as B/16 or L/14; or
    # resnet18, 34, 50, 101, 152; or alexnet; or stored: the dataset holds features of an encoder
    # (see tools/extract_features.py).
    c.model.name = "B/16"
    # Of stored features: vectors an example besides the pooled one. This and the width come from
    # the data.
    c.model.tokens = 0
    # Overrides of a ViT's named size; 0 keeps it. The width of a ResNet is that of its first stage,
    # 64, which the next ones double.
    c.model.width = 0
    c.model.depth = 0
    c.model.mlp = 0
    c.model.heads = 0
    # The same of a caption decoder; 0 is the ViT's, but half its depth. Beside any other encoder 0
    # is M's, and these are of a text tower, too.
    c.model.decoder_width = 0
    c.model.decoder_depth = 0
    c.model.decoder_mlp = 0
    c.model.decoder_heads = 0
    # How a ViT's pooled vector is made: mean of the patches' tokens (gap), attention pooling
    # (map), the class token (class).
    c.model.pool = "gap"
    # The rest of what tells ViTs of one size apart; an imported one sets these. A learned token
    # before those of the patches.
    c.model.class_token = False
    # A LayerNorm before the first block, as in CLIP.
    c.model.pre_norm = False
    # What the last LayerNorm is applied to: all tokens, or only the pooled vector, as in CLIP.
    c.model.final_norm = "tokens"
    # Of the encoder's MLPs: gelu_tanh (approximated as by the authors), gelu, quick_gelu (CLIP).
    c.model.activation = "gelu_tanh"
    # What the encoder's layer normalisations add to the variance.
    c.model.norm_eps = 1e-6
    # A ResNet's first convolution: imagenet (7 x 7 with stride 2, then a max pooling), or small
    # (3 x 3, for images as of CIFAR).
    c.model.stem = "imagenet"
    # What the encoder sees of images: rgb, or lightness: gray in all three channels, whatever it is
    # given, as one that learned to colour them was.
    c.model.colours = "rgb"
    # Attention kernel: xla, cudnn (fused, NVIDIA GPUs, half precision), recompute (the weights are
    # computed again in the backward pass), auto (cudnn where it runs, recompute on TPUs).
    c.model.attention = "auto"
    # What transformers keep for the backward pass: none (recompute nothing), full, dots,
    # dots_no_batch, lean (what TPUs are fastest with; see cap_pretrain/models/layers.py); auto is
    # lean on TPUs, else none.
    c.model.remat = "auto"
    # Layers per iteration of the scan over depth: more compile time, and what the backward pass
    # needs is not copied into one array for all layers. 0: all of them on TPUs, else 1.
    c.model.unroll = 0
    # Parts of the captions, along their length, for which a captioner's logits are made, one after
    # the other, and made again in the backward pass: no array is batch x length x vocabulary.
    c.model.logit_chunks = 1
    # After attention and MLP; and of whole residual branches (encoder and text tower).
    c.model.dropout = 0.0
    c.model.stochastic_depth = 0.0

    # What is learned from: a learner's name and its Options (see cap_pretrain/learners).
    c.learner = learners.defaults("captioner")

    c.data = ConfigDict()
    # "scenes", a TFDS name, the path or URL (gs://, s3://, …: what fsspec reads) of a TFDS-format
    # dataset, or a mixture "a:0.2+b:0.8".
    c.data.name = "scenes"
    c.data.split = "train"
    c.data.eval_split = "val"
    # Train on this fraction of every class, the same whatever else is drawn; for labelled datasets.
    c.data.fraction = 1.0
    # Classes of which data.split has fewer examples are dropped, in all splits of the run's own
    # data, and the others numbered anew; of each that stays, data.split has at most class_max
    # examples, drawn before data.fraction. 0 is off, for both.
    c.data.class_min = 0
    c.data.class_max = 0
    # Where TFDS looks for datasets given by name, a path or URL; "" is its own default
    # (~/tensorflow_datasets).
    c.data.dir = ""
    # Local folder with room for copies of the remote datasets that are read; "" is
    # ~/.cache/cap_pretrain. Processes and runs share it (see cap_pretrain/data/sources/storage.py).
    c.data.cache = ""
    # A run ends, after saving, when more than this share of its last 10,000 examples did not
    # decode, so that neighbours stood in for them; 1: never.
    c.data.max_broken = 0.01
    # Names of the features in a stored dataset; nested ones as "captions/text"; captions may come
    # from several by weight, "caption:2+alt_text".
    c.data.fields = ConfigDict(DEFAULT_FIELDS)
    # Side in pixels. The recipe resizes to 224 x 224, ignoring the aspect ratio.
    c.data.image_size = 224
    # "none" resizes the whole image; "random" crops a random part (area 0.08 to 1) first, "window"
    # a square of 7/8 of the shorter side; with these, evaluation takes the central square.
    c.data.crop = "none"
    # Mirror half of the images. Captions that say left and right become wrong.
    c.data.flip = False
    # Every batch is of captions with as many tokens; an epoch is each caption once, not each image
    # (see cap_pretrain/data/sources/buckets.py).
    c.data.buckets = False
    # Worker processes that prepare batches; 0 uses threads of the training process.
    c.data.workers = 0
    # The embedded dataset `scenes`.
    c.data.scenes = ConfigDict(dataclasses.asdict(ScenesOptions()))

    c.text = ConfigDict()
    # A sentencepiece model or a file of words, which brings its own rules and casing; "" makes one
    # of the training captions, kept in the workdir.
    c.text.tokenizer = ""
    # What is made: sentencepiece (subwords) or words.
    c.text.kind = "sentencepiece"
    # Pieces of sentencepiece. Words are as many as are frequent enough.
    c.text.vocab_size = 32_000
    # Tokens a caption, EOS included; shorter ones are padded, longer ones cut, EOS kept.
    c.text.length = 64
    c.text.lower = True
    # What is a word, and which are kept (see cap_pretrain/data/text/words.py).
    c.text.words = ConfigDict(dataclasses.asdict(words.Rules()))

    c.optim = ConfigDict()
    c.optim.name = "adafactor"
    c.optim.lr = 1e-3
    # Examples a step for which that is; for more or fewer it is scaled in proportion (Goyal et al.
    # 2017, 1706.02677, section 2.1). 0: it is for `batch_size`, whatever that is.
    c.optim.lr_batch = 0
    # Gradients are scaled down to this global norm; 0 leaves them.
    c.optim.clip_norm = 1.0
    # Before that, each number of a gradient is cut to [-clip_value, clip_value]; 0 leaves them.
    c.optim.clip_value = 0.0
    # Decoupled weight decay, times the learning rate: p -= lr * weight_decay * p.
    c.optim.weight_decay = 0.1
    # Decay rates of the moments, and epsilon. 0 keeps the optimizer's own default (see
    # optim/optimizers.py); -1 means zero, so optim.name=sgd with b1=-1 has no momentum.
    c.optim.b1 = 0.0
    c.optim.b2 = 0.0
    c.optim.eps = 0.0
    # What first moments (momentum) are stored as: float32 or bfloat16; "" keeps the optimizer's own
    # default, bfloat16 of adafactor and float32 of the others. Second moments are float32.
    c.optim.moment_dtype = ""
    # Shape of the learning rate after the warm-up: cosine, linear, rsqrt, constant.
    c.optim.decay = "cosine"
    # Linear from 0. The recipe's 10,000 of 366,500 steps.
    c.optim.warmup_steps = 0
    c.optim.warmup_examples = 0
    c.optim.warmup_epochs = 0.0
    c.optim.warmup_share = 10_000 / 366_500
    # Linear to 0 at the end, for rsqrt and constant.
    c.optim.cooldown_steps = 0
    c.optim.cooldown_examples = 0
    c.optim.cooldown_epochs = 0.0
    c.optim.cooldown_share = 0.0
    # Rules on parameter paths, (regular expression, number); the first match wins, others get 1.
    # Learning rate multipliers; 0 freezes (no update, no optimizer state).
    c.optim.lr_rules = ()
    # Weight decay multipliers; kernels decay, other parameters do not, unless a rule says so.
    c.optim.decay_rules = ()
    # Decay of an exponential moving average of the parameters, used by evaluators; 0 is none.
    c.optim.ema = 0.0
    # How many steps in all may be left out because loss, gradient or update were not finite. With
    # 0 the first such step ends the run.
    c.optim.skip_bad_steps = 0

    # Waiting for an evaluator's figure to get better: lower rates, an early end (see plateau.py).
    c.plateau = ConfigDict(dataclasses.asdict(Plateau()))

    c.mesh = ConfigDict()
    # Devices along each axis; at most one is -1: what the others leave.
    c.mesh.data = -1
    # 0: on TPUs 16, or fewer where a slice has less than 32 chips; elsewhere 1.
    c.mesh.fsdp = 0
    c.mesh.tensor = 1
    # Sharding rules that go before the built-in ones: (regular expression, for each trailing
    # dimension an axis, several or None), as (".*/mlp/up/kernel", ("fsdp", "tensor")) or
    # (".*/mlp/up/bias", (("tensor", "fsdp"),)). An axis that does not divide its dimension goes to
    # another one of the rule's, or nowhere.
    c.mesh.rules = ()

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 0
    c.checkpoint.every_examples = 0
    c.checkpoint.every_epochs = 0.0
    c.checkpoint.every_share = 0.05
    # And when so many minutes have passed since the last, looked at as a step is logged; 0: never.
    c.checkpoint.every_minutes = 30.0
    # How many of the newest are kept; every multiple of keep_every_steps is kept besides (0: none).
    c.checkpoint.keep_last = 2
    c.checkpoint.keep_every_steps = 0
    # An evaluator's figure, as "val/loss": the checkpoint with the best one is kept besides, and
    # every evaluation comes with a checkpoint. "" keeps none.
    c.checkpoint.best = ""
    # Which figure is the best: min or max.
    c.checkpoint.best_mode = "min"

    c.log = ConfigDict()
    c.log.every_steps = 50
    c.log.every_examples = 0
    c.log.every_epochs = 0.0
    c.log.every_share = 0.0
    # At each step, a fingerprint of which examples it has seen in which order: data/ids.
    c.log.ids = False
    # A loss so many robust standard deviations above the median of the last 100 steps is told and
    # logged as spike/loss; 0: none is.
    c.log.spikes = 8.0

    c.eval = ConfigDict()
    c.eval.every_steps = 0
    c.eval.every_examples = 0
    c.eval.every_epochs = 0.0
    c.eval.every_share = 0.1
    # Evaluators by the name under which their results are kept (see cap_pretrain/evals).
    c.evals = ConfigDict()
    return c.lock()


def arguments(text: str | None, **defaults) -> SimpleNamespace:
    """Reads the `key=value,…` after the colon of `--config=FILE:…`.

    Args:
      text: what follows the colon.
      **defaults: the accepted keys. A tuple lists the accepted values, the default first; any
        other value is the default itself.

    Raises:
      UserError: an unknown key or value.
    """
    values = {k: v[0] if isinstance(v, tuple) else v for k, v in defaults.items()}
    for part in filter(None, (text or "").split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in defaults:
            raise UserError(
                f"--config: no argument {key!r} in {part!r}.{did_you_mean(key, defaults)}"
            )
        choices = defaults[key]
        if isinstance(choices, tuple) and value not in choices:
            raise UserError(f"--config: {key}={value!r} is unknown.{did_you_mean(value, choices)}")
        values[key] = value
    return SimpleNamespace(**values)


def trains(config: ConfigDict) -> bool:
    """Whether there are steps to take; without any, a run evaluates what it begins with."""
    return bool(config.total_steps or config.total_examples or config.total_epochs)


def validate(config: ConfigDict) -> None:
    """Checks what can be checked before anything is built. Raises UserError."""
    for field, choices in CHOICES.items():
        value = get(config, field)
        if value not in choices:
            raise UserError(f"{field}: {value!r} is unknown.{did_you_mean(value, choices)}")
    build.check(config)
    for field in AT_LEAST_ONE:
        if get(config, field) < 1:
            raise UserError(f"{field}: {get(config, field)} must be at least 1.")
    if config.batch_size % config.accumulate:
        raise UserError(
            f"accumulate: {config.accumulate} parts do not divide batch_size={config.batch_size}."
        )
    if not trains(config) and not (config.encoder and len(config.evals)):
        raise UserError("total_steps: the length of the run is not set; give --config.total_steps.")
    for field in NOT_NEGATIVE:
        if get(config, field) < 0:
            raise UserError(f"{field}: {get(config, field)} must not be negative.")
    if not 0 <= config.optim.ema < 1:
        raise UserError(f"optim.ema: {config.optim.ema} is not in [0, 1).")
    if config.text.tokenizer and not Path(config.text.tokenizer).is_file():
        raise UserError(f"text.tokenizer: there is no file {config.text.tokenizer!r}.")
    words.Rules(**config.text.words)
    members = parse_mixture(config.data.name)
    cls = learners.learner_class(config.learner.name)
    learners.options(config)
    if config.data.buckets and (len(members) > 1 or "text" not in cls.reads):
        what = f"the mixture {config.data.name}" if len(members) > 1 else config.learner.name
        raise UserError(
            f"data.buckets: is for learning from the captions of one dataset, not for {what}; set "
            "data.buckets=False."
        )
    frozen = [rule[0] for rule in config.optim.lr_rules if tuple(rule[1:]) == (0,)]
    has_encoder = config.encoder or config.model.name == STORED
    if not has_encoder and any(rule.startswith("encoder/") for rule in frozen):
        raise UserError(
            "encoder: is empty, but optim.lr_rules freezes it; give --config.encoder=PATH."
        )
    for name, section in config.evals.items():
        evals.options(name, section)
    Plateau.of(config)
    best = config.checkpoint.best
    if best and best.rpartition("/")[0] not in config.evals:
        raise UserError(
            f"checkpoint.best: {best!r} is no figure of an evaluator of this config; write "
            f"EVALUATOR/FIGURE.{did_you_mean(best.rpartition('/')[0], config.evals)}"
        )


def get(config: ConfigDict, field: str):
    """Returns `config.a.b` for the field "a.b"."""
    for part in field.split("."):
        config = config[part]
    return config


def to_json(config: ConfigDict) -> str:
    """The resolved configuration as readable JSON, keys in alphabetical order."""
    return json.dumps(config.to_dict(), indent=2) + "\n"
