"""Jigsaw puzzles: pretraining an encoder by recognizing the order of the nine tiles of an image.

Noroozi & Favaro 2016 (1603.09246): each cell of a 3 x 3 grid yields a tile. The tiles are arranged
in one of N orders, one tower encodes each tile separately, and layers on all nine vectors predict
the order. Several measures prevent shortcuts. Tiles have random positions in their cells, so their
edges do not continue each other. Each tile is normalized separately. Images are converted to gray
at times, or their colors are jittered. The color channels of a tile are shifted against each other,
because chromatic aberration would otherwise reveal the distance of a tile from the image center.
"""

import dataclasses
import functools
import itertools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.data import resolution
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.learners import augment, permutations
from cap_pretrain.learners.classifier import classification
from cap_pretrain.learners.permutations import TILES
from cap_pretrain.models import alexnet
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.convnet import MEAN, STD, BatchNorm
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import constrain, dropout, split_optional
from cap_pretrain.models.sizes import ALEXNET, CONVNETS, parse_name

GRID = 3  # cells per side


class Jigsaw(nnx.Module):
    """A tower that encodes tiles, and layers that predict the order of nine tiles.

    Args:
        encoder: the tower.
        options: see `Options`.
        orders: the classes; each lists the cells in the order of their tiles.
    """

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        The defaults are for images of 256 pixels. With smaller images, tiles must stay large enough
        for the tower. If its last stage reduces a tile to a single position (a ResNet does so up
        to 32 pixels), only the center of the kernels there is trained, and the untrained rest
        contributes on whole images. So enlarge small images (`data.image_size`); a ResNet needs
        tiles of at least 33 pixels.

        Attributes:
            crop: Side in pixels of the square that is divided into cells: a random crop in
                training, the center crop in evaluation. It must fit in the image.
            cell: Side of a cell, a third of `crop`.
            tile: Side of the tile, a random or center crop of its cell.
            permutations: Number of orders, the classes.
            rule: How the orders are chosen, "mean" or "min" (see learners/permutations.py).
            file: File of permutations whose first lines are used instead.
            normalize: Whether to normalize each channel of a tile to ImageNet's mean and standard
                deviation of that channel.
            gray: Probability of converting a training image to gray.
            colour: Strength of the color jitter in training. 0 disables it; 1 is SimCLR's, which
                changes brightness, contrast and saturation by up to .8 and the hue by up to .2.
            shift: Maximum shift in pixels, in either direction, of each color channel of a training
                tile, within its cell.
            tower: Width of a layer with BatchNorm and ReLU on each tile's vector. 0 omits it.
            hidden: Widths of the ReLU layers on the nine vectors.
            dropout: Dropout rate after each of these layers.
        """

        crop: int = 225
        cell: int = 75
        tile: int = 64
        permutations: int = 100
        rule: str = "mean"
        file: str = ""
        normalize: bool = True
        gray: float = 0.3
        colour: float = 0.0
        shift: int = 2
        tower: int = 0
        hidden: tuple[int, ...] = (2048, 1024)
        dropout: float = 0.5

        def __post_init__(self):
            object.__setattr__(self, "hidden", tuple(self.hidden))
            if self.crop != GRID * self.cell:
                raise UserError(
                    f"learner.crop: {self.crop} is not {GRID} cells of learner.cell={self.cell}; "
                    f"set it to {GRID * self.cell}."
                )
            if not 1 <= self.tile <= self.cell:
                raise UserError(
                    f"learner.tile: {self.tile} is not from 1 to learner.cell={self.cell}."
                )
            if self.rule not in permutations.RULES:
                guess = did_you_mean(self.rule, permutations.RULES)
                raise UserError(f"learner.rule: {self.rule!r} is unknown.{guess}")
            for field in ("colour", "shift", "tower"):
                if getattr(self, field) < 0:
                    raise UserError(f"learner.{field}: {getattr(self, field)} is negative.")
            if not 0 <= self.gray <= 1:
                raise UserError(f"learner.gray: {self.gray} is not in [0, 1].")
            if not 0 <= self.dropout < 1:
                raise UserError(f"learner.dropout: {self.dropout} is not in [0, 1).")
            if min(self.hidden, default=1) < 1:
                raise UserError(f"learner.hidden: {self.hidden} are not all positive.")

    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {
        # VISSL, config/pretrain/jigsaw/jigsaw_8gpu_resnet, except for the learning-rate schedule:
        # x.1 after epochs 30, 60, 90 and 100 there, a cosine here. Its momentum is not Nesterov's.
        # It normalizes images, not tiles, and resizes the shorter side to 256; here, images are
        # cropped to squares before resizing.
        "reference": {
            "batch_size": 256,
            "total_epochs": 105.0,
            "data.image_size": 256,
            "data.crop": "window",
            "data.flip": True,
            "learner.crop": 255,
            "learner.cell": 85,
            "learner.tile": 64,
            "learner.permutations": 2000,
            "learner.rule": "mean",
            "learner.normalize": False,
            "learner.gray": 0.66,
            "learner.colour": 0.0,
            "learner.shift": 0,
            "learner.tower": 1000,
            "learner.hidden": (),
            "learner.dropout": 0.0,
            "optim.name": "sgd",
            "optim.lr": 0.1,
            "optim.lr_batch": 256,
            "optim.weight_decay": 1e-4,
            "optim.warmup_epochs": 5.0,
        },
        # github.com/demidovd98/image_captioning_with_SSL, the merge captioner on jigsaw features,
        # with the code that it builds on. The channel shift is from that code and the jigsaw paper,
        # the fraction of gray images from the paper. The jitter strength and the dropout rate are
        # ours, as the sources do not state them.
        "demidov": {
            "batch_size": 32,
            "total_epochs": 50.0,
            "data.image_size": 256,
            "learner.crop": 225,
            "learner.cell": 75,
            "learner.tile": 64,
            "learner.permutations": 100,
            "learner.rule": "mean",
            "learner.normalize": True,
            "learner.gray": 0.3,
            "learner.colour": 0.5,
            "learner.shift": 2,
            "learner.tower": 0,
            "learner.hidden": (2048, 1024),
            "learner.dropout": 0.5,
            "optim.name": "adamw",
            "optim.lr": 1e-3,
            "optim.weight_decay": 0.0,
            "optim.decay": "constant",
        },
    }

    reads = ("image",)

    def __init__(
        self,
        encoder: ImageEncoder,
        *,
        options: Options,
        orders: tuple[tuple[int, ...], ...],
        rngs: nnx.Rngs,
    ):
        self.encoder = encoder
        width = encoder.width
        if options.tower:
            self.tower = nnx.Linear(width, options.tower, rngs=rngs)
            self.tower_norm = BatchNorm(options.tower, rngs=rngs)
            width = options.tower
        widths = (TILES * width, *options.hidden)
        self.names = tuple(f"hidden_{n + 1}" for n in range(len(options.hidden)))
        for name, (inputs, outputs) in zip(self.names, itertools.pairwise(widths), strict=True):
            setattr(self, name, nnx.Linear(inputs, outputs, rngs=rngs))
        self.head = nnx.Linear(widths[-1], len(orders), rngs=rngs)
        self.options, self.orders = options, orders

    @classmethod
    def from_config(
        cls,
        config: ConfigDict,
        vocab_size: int,  # noqa: ARG003  # every learner takes it
        rngs: nnx.Rngs,
    ) -> "Jigsaw":
        """Build the learner that `config` describes."""
        options = learners.options(config)
        _check(options, config.model.name, "data.image_size", config.data.image_size)
        for side, _ in resolution.first_sizes(config):
            _check(options, config.model.name, resolution.FIELD, side)
        orders = _orders(options, config.seed)
        return cls(build_encoder(config, rngs), options=options, orders=orders, rngs=rngs)

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Compute the mean cross-entropy over images; masked examples do not count."""
        labels_key, tiles_key, layers_key = jax.random.split(key, 3)
        images = batch["image"]
        count = len(images)
        draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(self.orders)))
        labels = draw(augment.keys(labels_key, count))
        orders = jnp.array(self.orders)[labels]
        tiles = self._tiles(images, orders, tiles_key, train)
        logits = self.head(self._read(tiles, train=train, key=layers_key if train else None))
        counts = batch.get("mask", jnp.ones(count, bool))
        loss, metrics = classification(logits, labels, counts)
        return loss, metrics | {"chance": jnp.float32(1 / len(self.orders))}

    @staticmethod
    def panel_names() -> tuple[str, ...]:
        """Return what `illustrate` shows."""
        return "tiles as given", "in the predicted order"

    def illustrate(
        self, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Return nine tiles in a random order and in the predicted one, and which are right."""
        images, choices = batch["image"], jnp.array(self.orders)
        labels = jax.random.randint(key, (len(images),), 0, len(choices))
        orders = choices[labels]
        logits = self.head(self._read(self._tiles(images, orders, key, False)))
        found = jnp.argmax(logits, axis=1)
        plain = dataclasses.replace(self.options, normalize=False)
        cut = functools.partial(cut_tiles, options=plain, train=False)
        tiles = augment.each(cut, key, augment.unit_range(images), orders)
        back = jnp.argsort(choices[found], axis=1)
        arranged = jnp.take_along_axis(tiles, back[..., None, None, None], axis=1)
        return (_joined(tiles), _joined(arranged)), found == labels

    def features(self, images: jax.Array) -> jax.Array:
        """Return the input of the last layer, float32 [B, D], for uint8 images [B, H, W, 3].

        The tiles are those of evaluation, in their original order.
        """
        orders = jnp.tile(jnp.arange(TILES), (len(images), 1))
        return self._read(self._tiles(images, orders, jax.random.key(0), False))

    def _tiles(
        self, images: jax.Array, orders: jax.Array, key: jax.Array, train: bool
    ) -> jax.Array:
        """Cut uint8 images by orders int32 [B, TILES]: [B, TILES, tile, tile, 3] in [-1, 1]."""
        cut = functools.partial(cut_tiles, options=self.options, train=train)
        return augment.each(cut, key, augment.unit_range(images), orders) * 2 - 1

    def _read(
        self, tiles: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Return the input of the last layer, [B, D]."""
        encoder_key, *hidden_keys = split_optional(key, 1 + len(self.names))
        separate = constrain(tiles.reshape(-1, *tiles.shape[2:]))
        x = self.encoder(separate, train=train, key=encoder_key).pooled.astype(jnp.float32)
        if self.options.tower:
            x = nnx.relu(self.tower_norm(self.tower(x), train=train))
        x = constrain(x.reshape(len(tiles), -1))
        for name, hidden_key in zip(self.names, hidden_keys, strict=True):
            x = dropout(nnx.relu(getattr(self, name)(x)), self.options.dropout, hidden_key)
        return x


def cut_tiles(
    key: jax.Array, image: jax.Array, order: jax.Array, *, options: Jigsaw.Options, train: bool
) -> jax.Array:
    """Cut an image into tiles.

    In evaluation nothing is random: the crop and the tiles are centered, and colors are unchanged.

    Args:
        key: Random key for training.
        image: float32 [S, S, 3] in [0, 1].
        order: int32 [TILES], the cell of each tile.
        options: Options of the learner.
        train: Whether to augment.

    Returns:
        float32 [TILES, tile, tile, 3].
    """
    color_key, gray_key, crop_key, places_key, shifts_key = jax.random.split(key, 5)
    margin, slack = image.shape[0] - options.crop, options.cell - options.tile
    if train:
        if options.colour:
            jitter = {name: options.colour * x for name, x in augment.SIMCLR_JITTER.items()}
            image = augment.colour_jitter(color_key, image, **jitter)
        if options.gray:
            image = augment.grayscale(gray_key, image, options.gray)
        crop = jax.random.randint(crop_key, (2,), 0, margin + 1)
        places = jax.random.randint(places_key, (TILES, 1, 2), 0, slack + 1)
        reach = (-options.shift, options.shift + 1)
        shifts = jax.random.randint(shifts_key, (TILES, 3, 2), *reach)
        # No channel leaves its cell, so no two tiles ever share a pixel.
        places = jnp.clip(places + shifts, 0, slack)
    else:
        crop, places = jnp.full(2, margin // 2), jnp.full((TILES, 3, 2), slack // 2)
    cells = options.cell * jnp.stack(jnp.divmod(order, GRID), axis=1)
    starts = crop + cells[:, None] + places

    def cut(channel, start):
        return jax.lax.dynamic_slice(channel, start, (options.tile, options.tile))

    channels = jax.vmap(cut, (2, 0), 2)
    tiles = jax.vmap(channels, (None, 0))(image, starts)
    return _normalized(tiles) if options.normalize else tiles


def _joined(tiles: jax.Array, gap: int = 2) -> jax.Array:
    """Join tiles [B, TILES, S, S, 3] in [0, 1] with white gaps: uint8 [B, H, H, 3]."""
    margins = ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0))
    tiles = jnp.pad(tiles, margins, constant_values=1.0)
    count, side = len(tiles), tiles.shape[2]
    grid = tiles.reshape(count, GRID, GRID, side, side, 3).swapaxes(2, 3)
    whole = grid.reshape(count, GRID * side, GRID * side, 3)[:, :-gap, :-gap]
    return jnp.round(255 * whole).astype(jnp.uint8)


def _normalized(tiles: jax.Array) -> jax.Array:
    """Normalize each channel of [TILES, tile, tile, 3] to ImageNet's mean and deviation.

    After its own normalization, a convolutional tower then sees mean 0 and deviation 1. Deviations
    are taken as at least one level of 255, so patches of a single color are not amplified.
    """
    mean = jnp.mean(tiles, axis=(1, 2), keepdims=True)
    deviation = jnp.std(tiles, axis=(1, 2), keepdims=True)
    standard = (tiles - mean) / jnp.maximum(deviation, 1 / 255)
    return standard * jnp.array(STD) + jnp.array(MEAN)


def _orders(options: Jigsaw.Options, seed: int) -> tuple[tuple[int, ...], ...]:
    if not options.file:
        return permutations.greedy(options.permutations, options.rule, seed)
    found = permutations.read(options.file)
    if len(found) < options.permutations:
        raise UserError(
            f"learner.permutations: {options.permutations} is more than the {len(found)} in "
            f"{options.file}."
        )
    return found[: options.permutations]


def _check(options: Jigsaw.Options, model: str, field: str, side: int) -> None:
    """Raise UserError if images or tiles are too small, or tiles do not suit the tower."""
    if side < options.crop:
        raise UserError(f"learner.crop: {options.crop} is larger than {field}={side}.")
    if model == ALEXNET and options.tile < alexnet.SMALLEST:
        raise UserError(
            f"learner.tile: {options.tile} is too small for {ALEXNET}, which needs "
            f"{alexnet.SMALLEST}."
        )
    if model not in CONVNETS and options.tile % parse_name(model)[1]:
        raise UserError(
            f"learner.tile: {options.tile} is not a multiple of the patch size of {model}."
        )
