"""The attentive probe: accuracy of attention pooling and a linear layer on frozen tokens."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, Interrupted, Result
from cap_pretrain.evals.fit import PASSES, Work
from cap_pretrain.evals.metrics import classification
from cap_pretrain.evals.probes import attentive, probing
from cap_pretrain.evals.probes.features import (
    PIXELS,
    Features,
    Labelled,
    on_one_device,
    small_images,
)
from cap_pretrain.models import readout
from cap_pretrain.models.build import build_encoder, image_shape, pooling_size
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.models.sizes import Size
from cap_pretrain.telemetry import console
from cap_pretrain.telemetry.flops import count_flops

PATCH = 4
"""Side in pixels of the tokens of the layer "pixels", whose images have PIXELS x PIXELS pixels."""

_STORED = np.float16  # tokens on the host; the size of rounding is a thousandth of the value
_EACH = 10  # steps between two reports of progress

Progress = tuple[int, int]  # steps before a fit, and in all
Tried = tuple[float, float, float]  # learning rate, weight decay, held-out top-1


class Tokens(Features):
    """Computes the tokens [N, T, D] of a labeled source, float16, and keeps them in memory alone.

    The tokens of the layer "pixels" are the 16 patches of the image resized to 16 x 16 pixels,
    each with its position, a one-hot vector: attention pooling alone knows no order of tokens.
    """

    dtype = f"float16 (at most {np.finfo(_STORED).max:,.0f})"

    def __init__(self, context: Context, source: Any, *, layer: str, batch_size: int):
        super().__init__(context, source, layer=layer, batch_size=batch_size)
        self._image = image_shape(context.config, 1)

        def read(images):
            return self._read(build_encoder(context.config, nnx.Rngs(0)), images)

        self.shape: tuple[int, int] = jax.eval_shape(read, self._image).shape[1:]
        self.width = self.shape[1]
        if layer != "pixels":
            encoder = nnx.eval_shape(lambda: build_encoder(context.config, nnx.Rngs(0)))
            self.width = readout.width(encoder, layer)
        self.source = source

    def passes(self, flops: float) -> float:
        """Return how many images the encoder encodes with so many FLOPs."""

        def encode(images):
            encoder = build_encoder(self._context.config, nnx.Rngs(0))
            return encoder(normalize_images(images, jnp.float32)).tokens

        return flops / max(1, count_flops(encode, self._image))

    def __call__(self, variables: Any) -> Labelled:
        """Return the tokens for these weights, on every host; may raise as `Features` does."""
        tokens = np.empty((len(self.source), *self.shape), _STORED)
        labels, count = np.empty(len(self.source), np.int32), 0
        for part in self.batches(variables):
            end = count + len(part.labels)
            tokens[count:end], labels[count:end], count = *part, end
        self.check_any(count)
        return Labelled(tokens[:count], labels[:count])

    def batches(self, variables: Any) -> Iterator[Labelled]:
        """Yield the same in parts, in order, none of them empty."""
        for _, found in self._encode.batches(variables, self.source):
            part = self._checked(Labelled(*found))
            if len(part.labels):
                yield part

    def check_any(self, count: int) -> None:
        """Raise UserError if there are no images."""
        if not count:
            raise UserError(f"evals: {self.source} has no image with a label that can be decoded.")

    def _features_of(self, learner: Any, images: jax.Array) -> jax.Array:
        return self._read(learner.encoder, images).astype(_STORED)

    def _read(self, encoder: Any, images: jax.Array) -> jax.Array:
        if self._layer == "pixels":
            return _patches(small_images(images))
        return readout.read_tokens(encoder, self._layer, normalize_images(images, jnp.float32))


class MapProbe:
    """Attention pooling (models/vit.MapHead) and a linear layer, trained on tokens.

    Tokens are standardized by the mean and deviation of each dimension over the training tokens.
    All learning rates and weight decays are tried at once, with the same initial parameters and
    batches. The setting with the highest top-1 on the held-out part (of equals, the one with the
    smaller rate, then the stronger decay) is then trained on the whole training split. The test
    split is used once, for the metrics.

    An encoder that pools by attention itself (model.pool=map) gets a new pooling like any other.
    Training tokens stay in memory as float16, so their number is limited; those of the test split
    are classified as they are computed.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(probing.Options):
        """Settings, in addition to those of every probe.

        Attributes:
            layer: whose tokens are read: tokens (the encoder's last), the name of a layer, as
                block_6, or pixels (patches, without an encoder).
            validation_split: the split to choose on; "" holds out a tenth of every training class.
            lr: learning rates of AdamW to choose from.
            weight_decay: weight decays to choose from, times the learning rate. With a single pair
                of both, nothing is chosen or held out.
            epochs: passes over the training images, at least 500 steps.
            fit_batch: images in a step of the probe.
            memory_gb: of the training tokens; if they do not fit, as many training images as do are
                drawn at random.
        """

        layer: str = readout.TOKENS
        validation_split: str = ""
        lr: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
        weight_decay: tuple[float, ...] = (0.01, 0.3)
        epochs: float = 20.0
        fit_batch: int = 256
        memory_gb: float = 8.0

        def __post_init__(self):
            if not self.lr or min(self.lr) <= 0:
                raise UserError(f"map_probe.lr: {self.lr!r} must be one or more positive numbers.")
            if not self.weight_decay or min(self.weight_decay) < 0:
                raise UserError(
                    f"map_probe.weight_decay: {self.weight_decay!r} must be one or more numbers "
                    "that are not negative."
                )
            for name in ("epochs", "fit_batch", "memory_gb"):
                if not getattr(self, name) > 0:
                    raise UserError(f"map_probe.{name}: {getattr(self, name)} must be positive.")
            if self.layer == readout.POOLED:
                raise UserError(
                    "map_probe.layer: 'pooled' is one vector per image; choose 'tokens' or a layer."
                )

    def __init__(self, context: Context, options: Options):
        self._context, self._options = context, options
        self._settings = [
            attentive.Setting(lr, decay)
            for lr in sorted(options.lr)
            for decay in sorted(options.weight_decay, reverse=True)
        ]
        validation = options.validation_split if len(self._settings) > 1 else None
        self._splits = self._open(options, validation)
        (self._test, train), self._limited = (self._reader(k) for k in ("test", "train")), 0
        fits = int(options.memory_gb * 1e9 / (math.prod(train.shape) * _STORED().itemsize))
        fits //= 4 if validation else 1  # there are two splits then, and once more as they join
        if any(len(self._splits.sources[k]) > fits for k in self._splits.sources if k != "test"):
            self._limited = max(1, fits)
            limited = dataclasses.replace(options, train_limit=self._limited)
            self._splits = self._open(limited, validation)

    def _open(self, options: Options, validation: str | None) -> probing.Splits:
        return probing.Splits(self._context, options, validation, reader=Tokens)

    def _reader(self, part: str) -> Tokens:
        reader = self._splits.features[part]
        assert isinstance(reader, Tokens)
        return reader

    def work(self) -> Work:
        """Return the work of an evaluation: encoding all splits, and training the heads."""
        work, train = self._splits.work(), self._reader("train")
        share = len(self._splits.sources["train"]) / work.images
        tokens = jax.ShapeDtypeStruct((self._options.fit_batch, *train.shape), np.float32)
        step = train.passes(PASSES * attentive.flops(self._size(), tokens))
        heads = 1 + (len(self._settings) if len(self._settings) > 1 else 0)

        def passes(images: int) -> float:
            return images + step * heads * self._steps(int(share * images))

        return work._replace(passes=passes)

    def __call__(self, variables: Any) -> Result:
        """Choose the setting, train the probe and test it; may raise as `Features` does."""
        parts = [part for part in self._splits.features if part != "test"]
        data = self._splits.joined({part: self._reader(part)(variables) for part in parts})
        with on_one_device(), jax.default_matmul_precision("highest"):
            scale = attentive.scale_of(data.train.features, self._reader("train").width)
            fits = {"choose": data.final & ~data.choose, "final": data.final}
            steps = {name: self._steps(int(rows.sum())) for name, rows in fits.items()}
            setting, before = self._settings[0], 0
            tried: list[Tried] = []
            if len(self._settings) > 1:
                total = sum(steps.values())
                heads = self._fit(data, scale, fits["choose"], self._settings, (0, total))
                setting, tried = self._chosen(heads, data)
                before = steps["choose"]
            progress = (before, before + steps["final"])
            heads = self._fit(data, scale, fits["final"], [setting], progress)
        return self._tested(variables, heads, data, setting, tried)

    def _steps(self, images: int) -> int:
        steps = math.ceil(self._options.epochs * images / self._options.fit_batch)
        return max(attentive.LEAST_STEPS, steps)

    def _fit(
        self,
        data: probing.Data,
        scale: attentive.Scale,
        rows: np.ndarray,
        settings: list[attentive.Setting],
        progress: Progress,
    ) -> attentive.Heads:
        """Train a head for each setting on the rows that `rows`, bool [N], selects."""
        before, total = progress

        def each(step: int) -> None:
            if step % _EACH == 0:
                console.advance(before + step, total)
                if self._context.stop():
                    raise Interrupted

        heads = attentive.Heads(scale, self._size(), data.classes, settings, self._options.seed)
        chosen = np.flatnonzero(rows)
        heads.fit(
            data.train,
            chosen,
            steps=self._steps(len(chosen)),
            batch_size=self._options.fit_batch,
            each=each,
        )
        return heads

    def _size(self) -> Size:
        config, width = self._context.config, self._reader("train").width
        if self._options.layer == "pixels":
            return Size(width, depth=1, mlp=4 * width, heads=1)
        return pooling_size(config, width)

    def _chosen(
        self, heads: attentive.Heads, data: probing.Data
    ) -> tuple[attentive.Setting, list[Tried]]:
        """Return the best setting, and all that were tried."""
        rows = np.flatnonzero(data.choose)
        scores = heads.scores(data.train.features, self._options.fit_batch, rows)
        labels = data.train.labels[rows]
        top1 = [_metrics(own, labels)["top1"] for own in scores]
        best = max(range(len(top1)), key=lambda k: top1[k])  # of equals the first
        tried = [(*own, value) for own, value in zip(self._settings, top1, strict=True)]
        return self._settings[best], tried

    def _tested(
        self,
        variables: Any,
        heads: attentive.Heads,
        data: probing.Data,
        setting: attentive.Setting,
        tried: list[Tried],
    ) -> Result:
        """Classify the test split by the one head."""
        parts = [
            Labelled(self._classified(heads, part.features), part.labels)
            for part in self._test.batches(variables)
        ]
        self._test.check_any(len(parts))
        scores, labels = (np.concatenate(both) for both in zip(*parts, strict=True))
        classes = max(data.classes, 1 + int(labels.max()))
        # No image of further classes was trained on, so they come last.
        scores = np.pad(scores, [(0, 0), (0, classes - data.classes)], constant_values=-np.inf)
        data = data._replace(test=Labelled(scores, labels), classes=classes)
        own = np.flatnonzero(data.final)
        train = self._classified(heads, data.train.features, own)
        metrics = _metrics(scores, labels) | setting._asdict()
        if tried:
            metrics["held_out_top1"] = max(top1 for *_, top1 in tried)
        metrics["train_top1"] = _metrics(train, data.train.labels[own])["top1"]
        protocol = (
            "attention pooling with an MLP and a linear layer, by AdamW on the cross-entropy, on "
            f"standardised tokens; {self._options.epochs:g} epochs of batches of "
            f"{self._options.fit_batch}, at least {attentive.LEAST_STEPS} steps, cosine decay"
        )
        details = self._splits.details(data, protocol) | {
            "tokens": self._test.shape[0],
            "heads": self._size().heads,
            "held_out_top1_by_setting": tried,
        }
        return Result(metrics, details, (*self._splits.lines(data), *self._lines(setting, tried)))

    def _classified(
        self, heads: attentive.Heads, tokens: np.ndarray, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Return logits float32 [n, classes] of the one head; see `Heads.scores`."""
        with on_one_device(), jax.default_matmul_precision("highest"):
            return heads.scores(tokens, self._options.fit_batch, rows)[0]

    def _lines(self, setting: attentive.Setting, tried: list[Tried]) -> Iterator[str]:
        if self._limited:
            yield (
                f"trained on {self._limited:,} training images, drawn at random, whose tokens take "
                f"{self._options.memory_gb:g} GB; raise `memory_gb` for more"
            )
        rates = sorted(self._options.lr)
        if tried and len(rates) > 1 and setting.lr in (rates[0], rates[-1]):
            yield f"the best rate, {setting.lr:g}, is at an end of the values tried; extend `lr`"


def _metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    with on_one_device():
        return classification.metrics(*jax.device_put((scores, labels)))


def _patches(images: jax.Array) -> jax.Array:
    """Return patches with one-hot positions [B, 16, 64] of images [B, PIXELS, PIXELS, 3]."""
    across = PIXELS // PATCH
    x = images.reshape(-1, across, PATCH, across, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(len(images), across**2, -1)
    positions = jnp.broadcast_to(jnp.eye(across**2), (len(x), across**2, across**2))
    return jnp.concatenate([x, positions], axis=2)
