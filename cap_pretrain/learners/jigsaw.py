"""Learning an encoder by telling in which order the nine tiles of an image lie.

Noroozi & Favaro 2016 (1603.09246): of a 3 x 3 grid of cells each gives a tile, the tiles are laid
in one of N orders, one tower sees each of them alone, and layers on all nine vectors tell which
order it is. So that content has to tell: tiles lie anywhere in their cells, and so do not continue
each other; each is normalised by itself; images are gray at times, or lose their colours to a
jitter; and the colour channels of a tile are shifted against each other, since else chromatic
aberration shows how far from the centre a tile is.
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

GRID = 3  # cells a side
# Brightness, contrast, saturation and hue, of SimCLR (appendix A).
JITTER = (0.8, 0.8, 0.8, 0.2)


class Jigsaw(nnx.Module):
    """A tower for tiles, and layers on what it makes of nine of them."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        The defaults are for images of 256 pixels. Of smaller ones, tiles must stay large enough for
        the tower: one of which its last stage makes a map of one position (a ResNet, of up to 32
        pixels) trains no more of the kernels there than their middle, and on whole images the rest
        speaks up. So enlarge small images (`data.image_size`); a ResNet wants tiles of 33 or more.

        Attributes:
          crop: side in pixels of the square that is cut into cells, at random in training and from
            the middle in evaluation, of an image that is no smaller.
          cell: a third of it.
          tile: side of what is cut of a cell, likewise. It moves by up to cell - tile pixels.
          permutations: how many orders there are to tell apart.
          rule: by which they are chosen, "mean" or "min" (see learners/permutations.py).
          file: takes the first of a file of them instead.
          normalize: whether each channel of a tile is moved and scaled to the mean and deviation
            that it has in ImageNet.
          gray: probability that a training image is gray.
          colour: strength of the colour jitter in training, 0 for none: at 1, brightness, contrast
            and saturation change by up to .8, the hue by .2 (as for SimCLR: Chen et al. 2020,
            2002.05709, appendix A).
          shift: by up to how many pixels, either way, each colour channel of a training tile is
            shifted by itself, within its cell.
          tower: width of a layer that each tile's vector goes through first, with BatchNorm and
            ReLU; 0 is none.
          hidden: widths of the layers on the nine vectors, each with ReLU.
          dropout: rate behind each of these.
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
                    f"choose {GRID * self.cell}."
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
        # VISSL, config/pretrain/jigsaw/jigsaw_8gpu_resnet: all but the decay of the learning rate,
        # which is x.1 after epochs 30, 60, 90 and 100 there, and a cosine here. Its momentum is not
        # Nesterov's. It normalises images, not tiles, and resizes the shorter side to 256; squares
        # are cut before that here.
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
        # The merge captioner on jigsaw features, with the code that it builds on; channels are
        # shifted in that code and in the paper, which has the share of gray images, too. Strength
        # of the jitter and dropout are ours, nothing is said of them.
        "seed002": {
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
        """`orders`: what there is to tell apart, each the cells in the order of their tiles."""
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
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "Jigsaw":
        options = learners.options(config)
        _check(options, config.model.name, config.data.image_size)
        orders = _orders(options, config.seed)
        return cls(build_encoder(config, rngs), options=options, orders=orders, rngs=rngs)

    def loss(
        self, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Mean cross-entropy over images; masked ones do not count."""
        of_labels, of_tiles, of_layers = jax.random.split(key, 3)
        images = batch["image"]
        count = len(images)
        draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(self.orders)))
        labels = draw(augment.keys(of_labels, count))
        orders = jnp.array(self.orders)[labels]
        tiles = self._tiles(images, orders, of_tiles, train)
        logits = self.head(self._read(tiles, train=train, key=of_layers if train else None))
        counts = batch.get("mask", jnp.ones(count, bool))
        loss, metrics = classification(logits, labels, counts)
        return loss, metrics | {"chance": jnp.float32(1 / len(self.orders))}

    def features(self, images: jax.Array) -> jax.Array:
        """uint8 images [B, H, W, 3] -> float32 [B, D], what the last layer reads of their tiles.

        The tiles are those of evaluation, in their own order.
        """
        orders = jnp.tile(jnp.arange(TILES), (len(images), 1))
        return self._read(self._tiles(images, orders, jax.random.key(0), False))

    def _tiles(
        self, images: jax.Array, orders: jax.Array, key: jax.Array, train: bool
    ) -> jax.Array:
        """uint8 images and orders int32 [B, TILES] -> [B, TILES, tile, tile, 3] in [-1, 1]."""
        cut = functools.partial(cut_tiles, options=self.options, train=train)
        return augment.each(cut, key, augment.unit_range(images), orders) * 2 - 1

    def _read(
        self, tiles: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Tiles -> what the last layer reads."""
        of_encoder, *of_hidden = split_optional(key, 1 + len(self.names))
        each = constrain(tiles.reshape(-1, *tiles.shape[2:]))
        x = self.encoder(each, train=train, key=of_encoder).pooled.astype(jnp.float32)
        if self.options.tower:
            x = nnx.relu(self.tower_norm(self.tower(x), train=train))
        x = constrain(x.reshape(len(tiles), -1))
        for name, drop in zip(self.names, of_hidden, strict=True):
            x = dropout(nnx.relu(getattr(self, name)(x)), self.options.dropout, drop)
        return x


def cut_tiles(
    key: jax.Array, image: jax.Array, order: jax.Array, *, options: Jigsaw.Options, train: bool
) -> jax.Array:
    """image float32 [S, S, 3] in [0, 1] -> its tiles [TILES, tile, tile, 3], from cells `order`.

    In evaluation nothing is drawn: crop and tiles are central, and colours stay.
    """
    of_colour, of_gray, of_crop, of_places, of_shifts = jax.random.split(key, 5)
    room, loose = image.shape[0] - options.crop, options.cell - options.tile
    if train:
        if options.colour:
            amounts = (options.colour * amount for amount in JITTER)
            image = augment.colour_jitter(of_colour, image, *amounts)
        if options.gray:
            image = augment.grayscale(of_gray, image, options.gray)
        crop = jax.random.randint(of_crop, 2, 0, room + 1)
        places = jax.random.randint(of_places, (TILES, 1, 2), 0, loose + 1)
        reach = (-options.shift, options.shift + 1)
        shifts = jax.random.randint(of_shifts, (TILES, 3, 2), *reach)
        # No channel leaves its cell, so that no two tiles ever share a pixel.
        places = jnp.clip(places + shifts, 0, loose)
    else:
        crop, places = room // 2, jnp.full((TILES, 3, 2), loose // 2)
    cells = options.cell * jnp.stack(jnp.divmod(order, GRID), axis=1)
    starts = crop + cells[:, None] + places

    def cut(channel, start):
        return jax.lax.dynamic_slice(channel, start, (options.tile, options.tile))

    channels = jax.vmap(cut, (2, 0), 2)
    tiles = jax.vmap(channels, (None, 0))(image, starts)
    return _normalized(tiles) if options.normalize else tiles


def _normalized(tiles: jax.Array) -> jax.Array:
    """Moves and scales each channel of [TILES, tile, tile, 3] to ImageNet's mean and deviation.

    What a convolutional tower then sees, behind its own normalisation, has mean 0 and deviation 1.
    A deviation of less than one level of 255, as of a patch of one colour, is not blown up.
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
            f"learner.permutations: {options.permutations} are more than the {len(found)} of "
            f"{options.file}."
        )
    return found[: options.permutations]


def _check(options: Jigsaw.Options, model: str, side: int) -> None:
    """Raises UserError if images or tiles are too small, or the tower does not take such tiles."""
    if side < options.crop:
        raise UserError(f"learner.crop: {options.crop} is larger than data.image_size={side}.")
    if model == ALEXNET and options.tile < alexnet.SMALLEST:
        raise UserError(
            f"learner.tile: {options.tile} is too small for {ALEXNET}, which needs "
            f"{alexnet.SMALLEST}."
        )
    if model not in CONVNETS and options.tile % parse_name(model)[1]:
        raise UserError(
            f"learner.tile: {options.tile} is no multiple of the patch size of {model}."
        )
