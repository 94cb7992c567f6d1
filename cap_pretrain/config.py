"""The default configuration, with every field documented.

A config file in `configs/` starts from `default()` and changes only what differs. The default is
locked: setting a field that does not exist is an error.

Durations (`total`, `optim.warmup`, `optim.cooldown`, `checkpoint.every`, `eval.every`, `log.every`)
are given as `…_steps`, `…_examples`, `…_epochs` or `…_share` (a fraction of the whole run; not for
`total`). The first of these that is set counts, in that order, so `--config.total_steps=100`
shortens any run, whichever way its file gives the duration.
"""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.data.scenes.source import ScenesOptions
from cap_pretrain.data.sources.base import DEFAULT_FIELDS
from cap_pretrain.data.text import words
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.optim.muon import Muon
from cap_pretrain.optim.mup import Mup
from cap_pretrain.optim.plateau import Plateau


def default() -> ConfigDict:
    """Return the default configuration: the recipe of Cap B/16 (Tschannen et al. 2023)."""
    c = ConfigDict()
    c.seed = 0  # The seed of every random choice of a run
    # Length of the run. The authors' public config: 366,500 steps of 8192, 3.0B examples.
    c.total_steps = 0
    c.total_examples = 0
    c.total_epochs = 0.0
    c.batch_size = 8192  # Examples per step, over all devices and hosts
    # Parts of gradient accumulation: the gradient of a batch is computed in so many sequential
    # parts to save memory. It is the gradient of the whole batch for contrastive learners too,
    # which therefore embed every example twice. BatchNorm normalizes each part by itself.
    c.accumulate = 1
    # Of activations; parameters, softmax and loss are float32. "auto": bfloat16, on CPU float32.
    c.dtype = "auto"
    # Compute the same bits on every run of the same program. Only NVIDIA GPUs need this, at some
    # cost in speed; CPUs and TPUs are deterministic anyway.
    c.deterministic = False
    # Where compiled programs are kept, so that a restart need not compile: a folder, or "off".
    # "auto": .compile_cache beside the workdir on GPUs and TPUs, off on CPUs and for a workdir in a
    # bucket. They are machine code: name no folder that others may write to. It may be in a bucket,
    # gs://BUCKET/FOLDER. JAX_COMPILATION_CACHE_DIR takes precedence.
    c.compile_cache = "auto"
    # Initialize from a workdir (its newest checkpoint, or WORKDIR/checkpoints/STEP), an exported
    # encoder, or one of another ecosystem (see convert). Weights, `model` fields and image size
    # are taken from it. A field given on the command line keeps its value or is refused; a ViT's
    # position embeddings are resampled to a given data.image_size.
    c.encoder = ""
    # The training objective: a learner's name and its Options (see cap_pretrain/learners).
    c.learner = learners.defaults("captioner")
    c.model = _model()
    c.data = _data()
    c.text = _text()
    c.optim = _optim()
    # Reduce the learning rate on a plateau of an evaluator's metric, or stop early.
    c.plateau = ConfigDict(dataclasses.asdict(Plateau()))
    c.mesh = _mesh()
    c.checkpoint = _checkpoint()
    c.log = _log()
    c.eval = ConfigDict()
    # How often the evaluators run.
    c.eval.every_steps = 0
    c.eval.every_examples = 0
    c.eval.every_epochs = 0.0
    c.eval.every_share = 0.1
    # Evaluators whose limit is not set read no more examples than take as long as the training
    # between two evaluations (see cap_pretrain/evals/fit.py). False: all examples, or their limit.
    c.eval.fit = True
    # Evaluators, by the name under which their results are stored (see cap_pretrain/evals).
    c.evals = ConfigDict()
    return c.lock()


def _model() -> ConfigDict:
    c = ConfigDict()
    # Size and patch of a ViT: mu, Ti, S, M, B, L, So400m, H, g with /PATCH, as B/16 or L/14; or
    # resnet18, 34, 50, 101, 152; or alexnet; or stored, for datasets that hold the features of an
    # encoder (see tools/extract_features.py).
    c.name = "B/16"
    # Stored features: vectors per example besides the pooled one; read from the data, like width.
    c.tokens = 0
    # Overrides of a ViT's named size; 0 keeps it. The width of a ResNet is that of its first stage,
    # 64, which each later stage doubles.
    c.width = 0
    c.depth = 0
    c.mlp = 0
    c.heads = 0
    # The same for a caption decoder; 0 is the ViT's size with half its depth. With any other
    # encoder 0 is size M, and these fields apply to a text tower, too.
    c.decoder_width = 0
    c.decoder_depth = 0
    c.decoder_mlp = 0
    c.decoder_heads = 0
    # How a ViT pools its tokens: mean of the patches (gap), attention pooling (map), class token
    # (class). Importing an encoder sets this and the fields up to norm_eps.
    c.pool = "gap"
    c.class_token = False  # A learned token before those of the patches
    c.registers = 0  # Further learned tokens after it, as in DINOv2 with registers
    c.positions = "learned"  # Of patches: learned, sines (AIMv2 native) or rotary (DINOv3)
    c.rope_base = 100.0  # Base of rotary positions
    c.patch_norm = False  # A norm of the patches before positions are added, as in AIMv2
    c.pre_norm = False  # A norm before the first block, as in CLIP
    c.final_norm = "tokens"  # What the last norm is applied to; only the pooled vector in CLIP
    c.activation = "gelu_tanh"  # Of MLPs: gelu_tanh (the authors'), gelu, quick_gelu (CLIP), silu
    c.gated = False  # MLPs with a gate, activation(gate(x)) * up(x), as SwiGLU with silu (AIMv2)
    c.bias = True  # Biases of the linear layers of the encoder's blocks
    c.norm = "layer"  # The encoder's norms: layer, or rms (root mean square, AIMv2)
    c.norm_eps = 1e-6  # Epsilon of these norms
    # A ResNet's first layer: imagenet (7 x 7, stride 2, max pooling) or small (3 x 3; 32 to 64 px).
    c.stem = "imagenet"
    # The encoder's input: rgb, or lightness, which turns any image gray in all three channels, as
    # encoders trained by colorization expect.
    c.colours = "rgb"
    # Attention kernel: xla, cudnn (fused; NVIDIA GPUs, half precision), keep (explicit gradient,
    # weights kept rounded), recompute (weights computed again in the backward pass), auto (cudnn
    # where it runs, keep on TPUs (recompute on v4), a form for CPUs there, else xla).
    c.attention = "auto"
    # Rematerialization policy of transformers: none (keep everything), full, dots, dots_no_batch,
    # lean (the fastest on TPUs; see cap_pretrain/models/compute.py). auto is lean on TPUs, none on
    # CPUs, and on GPUs the first of none, lean, full that is estimated to fit into memory.
    c.remat = "auto"
    # Layers per iteration of the scan over depth. More take longer to compile, and save copying
    # what the backward pass needs into arrays stacked over layers. 0: all on TPUs, on GPUs but
    # with remat=full, and on CPUs from 6 layers; else 1.
    c.unroll = 0
    # Compute a captioner's logits in so many sequential parts of the text, and again in the
    # backward pass, so that no array is batch x length x vocabulary.
    c.logit_chunks = 1
    # Dropout after attention and MLP; stochastic depth drops whole residual branches (of the
    # encoder and the text tower).
    c.dropout = 0.0
    c.stochastic_depth = 0.0
    # Share of a ViT's patch tokens that each image keeps in training, drawn anew at every step;
    # evaluation and frozen encoders see all tokens (docs/schedules.md).
    c.keep_tokens = 1.0
    # Where tokens are dropped: encoder, before its blocks; or decoder, so that only a captioner's
    # decoder reads fewer.
    c.keep_tokens_at = "encoder"
    # Share of the run during which tokens are dropped; afterwards all are kept.
    c.keep_tokens_until = 1.0
    return c


def _data() -> ConfigDict:
    c = ConfigDict()
    # "scenes", a TFDS name, the path or URL (gs://, s3://, … as supported by fsspec) of a dataset
    # in TFDS format, "wds:PATTERN" or "parquet:PATTERN" (docs/data.md), or a mixture "a:0.2+b:0.8".
    c.name = "scenes"
    c.split = "train"  # The split to train on
    c.eval_split = "val"  # The split that evaluators read by default
    # If the first dataset has only the split train, this many random examples of it, the same in
    # every run, are held out of training as "val"; whole blocks if it is a URL, "wds:…" or
    # "parquet:…". -1: a twentieth, at most 10,000; 0: none.
    c.held_out = -1
    # Train on this fraction of every class, always the same examples; for labelled datasets.
    c.fraction = 1.0
    # Classes with fewer than class_min examples in data.split are dropped from all splits of the
    # run's own data, and the others are renumbered. Each remaining class keeps at most class_max
    # examples of data.split, chosen before data.fraction. 0 disables either.
    c.class_min = 0
    c.class_max = 0
    # Where TFDS looks for datasets given by name, a path or URL; "" is its own default
    # (~/tensorflow_datasets).
    c.dir = ""
    # Local folder for what is kept of datasets: remote files or their blocks, decoded row groups of
    # Parquet files, indexes of tars, and the lengths and labels that a pass over a dataset found.
    # "" is ~/.cache/cap_pretrain. Processes and runs share it (docs/data.md).
    c.cache = ""
    # The order of the examples: global shuffles all of a dataset; blocks shuffles blocks of
    # examples that are stored together, and within windows of some blocks, so that each host reads
    # just the blocks that it shows (docs/data.md). auto: blocks if a dataset is a URL, "wds:…" or
    # "parquet:…" and data.buckets is off, else global.
    c.order = "auto"
    c.block = 256  # Most examples of a block; a row group of Parquet always is one
    # Parts of the sequence of blocks, each of which makes the same rows of every batch. They divide
    # batch_size, as hosts should divide them. 0: the largest divisor of batch_size up to 256.
    c.lanes = 0
    # GB of stored data in two windows of all lanes and datasets, from which the blocks of a window
    # follow. Remote data need that much disk space over all hosts: a host that reads v of V lanes
    # needs v/V of it. Decoded row groups of Parquet files may take as much again.
    c.cache_gb = 64.0
    # The run stops, after saving, when more than this fraction of its last 10,000 examples did not
    # decode and were replaced by neighbors; 1: never.
    c.max_broken = 0.01
    # Names of the features in a stored dataset; nested ones as "captions/text"; captions may come
    # from several by weight, "caption:2+alt_text", also by weights that change (docs/data.md).
    c.fields = ConfigDict(DEFAULT_FIELDS)
    # In training, for each feature of data.fields.captions: what its captions begin with, which the
    # model is given like a question; and their most tokens, EOS included, 0 for no limit. (): none.
    c.caption_prefixes = ()
    c.caption_lengths = ()
    # Side in pixels. The recipe resizes to 224 x 224, ignoring the aspect ratio.
    c.image_size = 224
    # Sides of the images in the first parts of the run, before image_size, each with its share of
    # the run, as "84:0.8" or "84:0.7+112:0.2" (docs/schedules.md). Evaluators, exports and the
    # position embeddings use image_size.
    c.first_sizes = ""
    # "none" resizes the whole image; "random" crops a random part (area 0.08 to 1) first, "window"
    # a square of 7/8 of the shorter side. With the latter two, evaluation takes the central square.
    c.crop = "none"
    # "naflex" keeps the aspect ratio, with at most the patches of a square image (docs/naflex.md).
    c.layout = "square"
    c.flip = False  # Mirror half of the images. Captions that mention left and right become wrong.
    # Regions (phrases with boxes) of each image that are drawn for a learner that reads them.
    c.regions = 1
    # Make every batch of captions with the same number of tokens; an epoch is then each caption
    # once, not each image (see cap_pretrain/data/sources/buckets.py).
    c.buckets = False
    c.workers = 0  # Worker processes that prepare batches; 0 uses threads of the training process
    c.scenes = ConfigDict(dataclasses.asdict(ScenesOptions()))  # The embedded dataset `scenes`
    return c


def _text() -> ConfigDict:
    c = ConfigDict()
    # A sentencepiece model with pad id 0 and an EOS piece; or a file of words or CLIP's
    # tokenizer.json (or merges.txt beside vocab.json), which bring their own rules and casing; ""
    # trains one on the training captions and stores it in the workdir.
    c.tokenizer = ""
    c.kind = "sentencepiece"  # The kind of tokenizer to train: sentencepiece (subwords) or words
    # Pieces of sentencepiece. The number of words follows from their frequencies instead.
    c.vocab_size = 32_000
    # Tokens per caption, EOS included; shorter captions are padded, longer ones cut, EOS kept.
    c.length = 64
    c.lower = True  # Lower-case the captions
    # False deletes ASCII punctuation before a sentencepiece model encodes a text, as in SigLIP.
    c.punctuation = True
    # How text is split into words, and which words are kept (see cap_pretrain/data/text/words.py).
    c.words = ConfigDict(dataclasses.asdict(words.Rules()))
    return c


def _optim() -> ConfigDict:
    c = ConfigDict()
    # The optimizer: adamw, adafactor, muon, lion, schedule_free, sgd or lars.
    c.name = "adafactor"
    c.lr = 1e-3  # The highest learning rate, reached after the warm-up
    # The batch size for which `lr` is given; with another one the learning rate is scaled linearly
    # (Goyal et al. 2017, 1706.02677, section 2.1). 0: `lr` is for `batch_size`.
    c.lr_batch = 0
    c.clip_norm = 1.0  # Gradients are scaled down to this global norm; 0 disables it
    # Before that, each element of a gradient is clipped to [-clip_value, clip_value]; 0 disables.
    c.clip_value = 0.0
    # Decoupled weight decay, times the learning rate: p -= lr * weight_decay * p.
    c.weight_decay = 0.1
    # Decay rates of the moments, and epsilon; of muon, those of its Adam. 0 keeps the optimizer's
    # own default (see optim/optimizers.py); -1 means zero, so optim.name=sgd with b1=-1 has no
    # momentum.
    c.b1 = 0.0
    c.b2 = 0.0
    c.eps = 0.0
    # The dtype of first moments (momentum): float32 or bfloat16; "" keeps the optimizer's own
    # default, bfloat16 for adafactor and float32 for the others. Second moments are float32.
    c.moment_dtype = ""
    # Width scaling of rates and initialization (muP; docs/optimizers.md).
    c.mup = ConfigDict(dataclasses.asdict(Mup()))
    c.muon = ConfigDict(dataclasses.asdict(Muon()))  # Of optim.name=muon, which updates matrices
    # Shape of the learning-rate schedule after the warm-up: cosine, linear, rsqrt, constant.
    c.decay = "cosine"
    # Linear from 0. The recipe's 10,000 of 366,500 steps.
    c.warmup_steps = 0
    c.warmup_examples = 0
    c.warmup_epochs = 0.0
    c.warmup_share = 10_000 / 366_500
    # Linear to 0 at the end, for rsqrt and constant.
    c.cooldown_steps = 0
    c.cooldown_examples = 0
    c.cooldown_epochs = 0.0
    c.cooldown_share = 0.0
    # Rules on parameter paths, (regular expression, number). The first match wins; the default
    # is 1. Learning-rate multipliers; 0 freezes (no update, no optimizer state).
    c.lr_rules = ()
    # Weight-decay multipliers. Without a rule, kernels decay and other parameters do not.
    c.decay_rules = ()
    # Decay of an exponential moving average of the parameters, used by evaluators; 0 disables it.
    c.ema = 0.0
    # How many steps in all may be skipped because loss, gradient or update were not finite. With 0
    # the first such step stops the run.
    c.skip_bad_steps = 0
    return c


def _mesh() -> ConfigDict:
    c = ConfigDict()
    # Devices that split the batch and hold the same parameters. Of the three axes (data, fsdp,
    # tensor), at most one may be -1, which takes all remaining devices.
    c.data = -1
    # Devices that split the batch, and parameters and optimizer state among them. 0: 16 on TPUs, or
    # fewer on slices of less than 32 chips; on GPUs those of a host, at most 8; on CPUs 1.
    c.fsdp = 0
    c.tensor = 1  # Shards heads, hidden units and the vocabulary
    # Sharding rules tried before the built-in ones: (regular expression, for each trailing
    # dimension an axis, several or None), as (".*/mlp/up/kernel", ("fsdp", "tensor")) or
    # (".*/mlp/up/bias", (("tensor", "fsdp"),)). An axis that does not divide its dimension moves to
    # another dimension of the rule, or is dropped.
    c.rules = ()
    return c


def _checkpoint() -> ConfigDict:
    c = ConfigDict()
    # How often a checkpoint is saved.
    c.every_steps = 0
    c.every_examples = 0
    c.every_epochs = 0.0
    c.every_share = 0.05
    # Also save when so many minutes have passed since the last checkpoint, checked whenever a step
    # is logged; 0: never.
    c.every_minutes = 30.0
    # How many of the newest are kept, besides every multiple of keep_every_steps (0: none).
    c.keep_last = 2
    c.keep_every_steps = 0
    # Every so many steps each host also keeps a copy of its part of the state, on its own disk or
    # in its memory, for restarts after a preemption without notice (docs/resuming.md); 0: never.
    c.local_every_steps = 0
    # The folder of these copies on each host. "": memory, /dev/shm, where the system has it, which
    # holds at most two copies; else the folder for temporary files.
    c.local = ""
    # An evaluator's metric, as "val/loss": the checkpoint with the best value is also kept, and
    # every evaluation is followed by a checkpoint. "" keeps none.
    c.best = ""
    c.best_mode = "min"  # Which value is the best: min or max
    return c


def _log() -> ConfigDict:
    c = ConfigDict()
    # How often loss, speed and other metrics are logged.
    c.every_steps = 50
    c.every_examples = 0
    c.every_epochs = 0.0
    c.every_share = 0.0
    c.parameters = False  # Print the table of all parameters, which is also in parameters.txt
    c.ids = False  # Log data/ids at every step, a fingerprint of its examples and their order
    # A loss so many robust standard deviations above the median of the last 100 steps is reported
    # and logged as spike/loss; 0 disables it.
    c.spikes = 8.0
    # Trace these steps, FIRST:LAST as "100:105", into WORKDIR/profile (docs/training.md); ""
    # traces none. The first process of a cluster does so.
    c.profile_steps = ""
    # Experiment trackers that get the figures, samples and config, joined by "+": wandb, mlflow.
    # TensorBoard files are always written.
    c.trackers = "tensorboard"
    return c


def arguments(text: str | None, **defaults: Any) -> SimpleNamespace:
    """Parse the `key=value,…` after the colon of `--config=FILE:…`, with these keys and defaults.

    A tuple lists the only values accepted, the default first. Other keys and values raise
    UserError.
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
    """Return whether the run has steps; without any it evaluates what it is initialized from."""
    return bool(config.total_steps or config.total_examples or config.total_epochs)


def get(config: ConfigDict, field: str) -> Any:
    """Return `config.a.b` for the field "a.b"."""
    for part in field.split("."):
        config = config[part]
    return config


def fields(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a config read from JSON: {"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, dict):
            found |= fields(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def to_json(config: ConfigDict) -> str:
    """Return the resolved configuration as indented JSON, keys in alphabetical order."""
    return json.dumps(config.to_dict(), indent=2) + "\n"
