"""Construction of models from the `model` section of a config."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import naflex
from cap_pretrain.distributed.platform import platform
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models import alexnet, tokens
from cap_pretrain.models.alexnet import AlexNet
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import Compute
from cap_pretrain.models.mlp import Details
from cap_pretrain.models.positions import MAX_BASE
from cap_pretrain.models.resnet import STEMS, ResNet
from cap_pretrain.models.sizes import (
    ALEXNET,
    CONVNETS,
    RESNETS,
    SIZES,
    STORED,
    Size,
    Stages,
    parse_name,
)
from cap_pretrain.models.stored import Stored
from cap_pretrain.models.vit import MapHead, Options, ViT
from cap_pretrain.naflex import MOST, NAFLEX, SQUARE


def check(config: ConfigDict) -> None:
    """Check `config.model` for consistency, also with the image size.

    Raises:
        UserError: A name is unknown, or fields are incompatible.
    """
    model = config.model
    for name in ("keep_tokens", "keep_tokens_until"):
        if not 0 < model[name] <= 1:
            raise UserError(f"model.{name}: {model[name]} is not in (0, 1].")
    if model.name == STORED:
        _check_stored(config)
        sizes = {"decoder_": text_size(config)}
    elif model.name in CONVNETS:
        _check_convnet(model)
        sizes = {"decoder_": text_size(config)}
    else:
        _check_vit(config)
        sizes = {"": encoder_size(config), "decoder_": decoder_size(config)}
    for prefix, size in sizes.items():
        if size.width % size.heads:
            raise UserError(
                f"model.{prefix}heads: {size.heads} does not divide the width {size.width}; "
                "choose a divisor."
            )
    check_side(model, config.data.image_size, "data.image_size")
    if config.data.layout == NAFLEX:
        _check_naflex(config)
        check_budget(config, config.data.image_size, "data.image_size")


def _check_naflex(config: ConfigDict) -> None:
    """Raise UserError if images in their own aspect ratio do not fit the model."""
    model, field = config.model, f"data.layout: {NAFLEX}"
    if model.name in (*CONVNETS, STORED):
        raise UserError(f"{field} is for a ViT, not for {model.name}; set it to {SQUARE}.")
    for name, usual in {"colours": "rgb", "keep_tokens": 1.0}.items():
        if model[name] != usual:
            raise UserError(
                f"model.{name}: {model[name]!r} does not work with {field}; set it to {usual!r}, "
                f"or data.layout to {SQUARE}."
            )
    if config.data.crop != "none":
        raise UserError(
            f"data.crop: {config.data.crop!r} makes squares, and {field} keeps whole images; set "
            "one of them to its default."
        )


def check_budget(config: ConfigDict, side: int, field: str) -> None:
    """Raise UserError, which names the field, if squares of `side` pixels have too many patches."""
    patch = patch_of(config)
    if patch and side // patch > MOST:
        raise UserError(
            f"{field}: {side} is more than {MOST} patches of {patch}, the most with data.layout: "
            f"{NAFLEX}; use {MOST * patch} or less."
        )


def check_side(model: ConfigDict, side: int, field: str) -> None:
    """Raise UserError, which names the field, unless images of `side` pixels fit the encoder."""
    if model.name == ALEXNET and side < alexnet.SMALLEST:
        raise UserError(
            f"{field}: {side} is too small for {ALEXNET}; use {alexnet.SMALLEST} or more."
        )
    if model.name in (*CONVNETS, STORED):
        return
    _, patch = parse_name(model.name)
    if side % patch:
        raise UserError(
            f"{field}: {side} is not a multiple of the patch size {patch} "
            f"of {model.name}; choose {max(1, side // patch) * patch}."
        )


def _check_vit(config: ConfigDict) -> None:
    model, size = config.model, encoder_size(config)
    head = size.width // size.heads
    _refuse(model, {"stem": "imagenet"}, "for a ResNet")
    if model.pool == "class" and not model.class_token:
        raise UserError("model.pool: 'class' needs --config.model.class_token=True.")
    if model.registers and not model.class_token:
        raise UserError("model.registers: they need --config.model.class_token=True.")
    if model.positions == "rotary" and head % 4:
        raise UserError(
            f"model.positions: heads have {head} channels, and rotary positions need a multiple of "
            "4; set model.heads or another kind of positions."
        )
    if model.positions == "sines" and size.width % 4:
        raise UserError(
            f"model.positions: the width is {size.width}, and sines need a multiple of 4; set "
            "model.width or another kind of positions."
        )
    if not 1 <= model.rope_base <= MAX_BASE:
        raise UserError(f"model.rope_base: {model.rope_base} is not from 1 to {MAX_BASE:g}.")
    if model.norm_eps <= 0:
        raise UserError(f"model.norm_eps: {model.norm_eps} must be positive.")


def _check_stored(config: ConfigDict) -> None:
    numbers = {f.name: 0 for f in dataclasses.fields(Size) if f.name != "width"}
    _refuse(
        config.model,
        numbers
        | dataclasses.asdict(Options())
        | {"stem": "imagenet", "colours": "rgb", "keep_tokens": 1.0},
        "for images",
    )
    for field, usual in {"crop": "none", "flip": False}.items():
        if config.data[field] != usual:
            raise UserError(
                f"data.{field}: {config.data[field]!r} needs images, but model.name is {STORED}: "
                f"features cannot be augmented; set it to {usual!r}."
            )


def _check_convnet(model: ConfigDict) -> None:
    numbers = {f.name: 0 for f in dataclasses.fields(Size)}
    if model.name in RESNETS:
        del numbers["width"]
    _refuse(model, numbers | dataclasses.asdict(Options()) | {"keep_tokens": 1.0}, "for a ViT")
    if model.stem not in STEMS:
        raise UserError(f"model.stem: {model.stem!r} is unknown.{did_you_mean(model.stem, STEMS)}")
    if model.name == ALEXNET:
        _refuse(model, {"stem": "imagenet"}, "for a ResNet")


def _refuse(model: ConfigDict, usual: dict[str, Any], meant: str) -> None:
    """Raise UserError if a field that this encoder ignores is not at its default."""
    for field, value in usual.items():
        if model[field] != value:
            raise UserError(
                f"model.{field}: {model[field]!r} is {meant}, but model.name is {model.name}; "
                f"set it to {value!r}."
            )


def encoder_size(config: ConfigDict) -> Size:
    """Return a ViT's size: that of `model.name` with the overrides in `config.model`."""
    size, _ = parse_name(config.model.name)
    return _overridden(size, config)


def encoder_width(config: ConfigDict) -> int:
    """Return the width of the encoder's tokens and pooled vector."""
    name = config.model.name
    if name == STORED:
        return config.model.width
    if name == ALEXNET:
        return alexnet.WIDTH
    return resnet_stages(config).width if name in RESNETS else encoder_size(config).width


def resnet_stages(config: ConfigDict) -> Stages:
    """Return a ResNet's shape: that of `model.name`, with its base overridden by `model.width`."""
    stages = RESNETS[config.model.name]
    return dataclasses.replace(stages, base=config.model.width or stages.base)


def pooling_size(config: ConfigDict, width: int) -> Size:
    """Return the size of attention pooling of tokens of this width.

    For the tokens of a ViT it is the ViT's size, as for its own `model.pool=map`. Otherwise the MLP
    is four times as wide as the tokens, and heads have 64 dimensions, or more so that they divide
    the width (both as in the named sizes).
    """
    if config.model.name not in (*CONVNETS, STORED) and encoder_width(config) == width:
        return encoder_size(config)
    heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
    return Size(width, depth=1, mlp=4 * width, heads=heads)


def text_size(config: ConfigDict) -> Size:
    """Return the size of the text transformer that accompanies the encoder.

    With a ViT it is the ViT's size. With any other encoder it is the size of CLIP's text tower
    (Radford et al. 2021, section 2.4: width 512, depth 12, 8 heads), our M, with the overrides
    `model.decoder_*`.
    """
    if config.model.name in (*CONVNETS, STORED):
        return _overridden(SIZES["M"], config, "decoder_")
    return encoder_size(config)


def decoder_size(config: ConfigDict) -> Size:
    """Return the caption decoder's size: `text_size` at half depth, with overrides."""
    size = text_size(config)
    half = dataclasses.replace(size, depth=max(1, size.depth // 2))
    return _overridden(half, config, "decoder_")


def _overridden(size: Size, config: ConfigDict, prefix: str = "") -> Size:
    given = {f.name: config.model[prefix + f.name] for f in dataclasses.fields(Size)}
    return dataclasses.replace(size, **{name: n for name, n in given.items() if n})


def compute(config: ConfigDict) -> Compute:
    """Return how the model computes: precision, attention kernel, rematerialization, dropout."""
    model = config.model
    auto = "float32" if platform() == "cpu" else "bfloat16"
    return Compute(
        dtype=jnp.dtype(auto if config.dtype == "auto" else config.dtype),
        attention=model.attention,
        remat=model.remat,
        unroll=model.unroll,
        logit_chunks=model.logit_chunks,
        dropout=model.dropout,
        stochastic_depth=model.stochastic_depth,
        deterministic=config.deterministic,
    )


def check_device(config: ConfigDict) -> None:
    """Raise UserError if the devices of this process cannot compute what the config asks for."""
    backend = platform()
    if config.dtype == "float16" and backend == "cpu":
        raise UserError("dtype: float16 is not for CPUs; use auto, float32 or bfloat16.")
    if config.model.attention == "cudnn" and backend != "gpu":
        raise UserError(
            f"model.attention: cudnn is for NVIDIA GPUs, not for a {backend}; use auto."
        )


def encoder_options(config: ConfigDict) -> Options:
    """Return a ViT's options, which have the names of the config's fields."""
    return Options(**{f.name: config.model[f.name] for f in dataclasses.fields(Options)})


def kept_tokens(config: ConfigDict, place: str) -> float:
    """Return the share of the patch tokens kept in training at `place`, one of `tokens.PLACES`."""
    return config.model.keep_tokens if config.model.keep_tokens_at == place else 1.0


def notes(config: ConfigDict) -> list[str]:
    """Return a line for the log if a run trains on a part of the patch tokens."""
    model = config.model
    if model.keep_tokens == 1:
        return []
    until = model.keep_tokens_until
    part = "In training" if until == 1 else f"In the first {until:.4g} of training"
    return [
        f"{part} the {model.keep_tokens_at} reads a share of {model.keep_tokens:.4g} of the patch "
        "tokens (model.keep_tokens)"
    ]


def patch_of(config: ConfigDict) -> int:
    """Return the side in pixels of the patches that images are stored as; 0 if they are squares."""
    return parse_name(config.model.name)[1] if config.data.layout == NAFLEX else 0


def image_shape(config: ConfigDict, count: int, side: int = 0) -> jax.ShapeDtypeStruct:
    """Return the shape of `count` images of a batch, `side` (0: `data.image_size`) pixels high."""
    model, side = config.model, side or config.data.image_size
    if model.name == STORED:
        return jax.ShapeDtypeStruct((count, 1 + model.tokens, model.width), jnp.float32)
    if patch := patch_of(config):
        shape = (count, (side // patch) ** 2, naflex.width_of(patch))
        return jax.ShapeDtypeStruct(shape, jnp.uint8)
    return jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8)


def build_encoder(config: ConfigDict, rngs: nnx.Rngs) -> ImageEncoder:
    """Build the image encoder of a config."""
    encoder = _encoder(config, rngs)
    encoder.colours = config.model.colours
    return encoder


def build_pooling(config: ConfigDict, width: int, rngs: nnx.Rngs) -> MapHead:
    """Build attention pooling of tokens of this width, apart from that of the encoder itself."""
    is_vit = config.model.name not in (*CONVNETS, STORED)
    return MapHead(
        pooling_size(config, width),
        details=encoder_options(config) if is_vit else Details(),
        compute=compute(config),
        rngs=rngs,
    )


def _encoder(config: ConfigDict, rngs: nnx.Rngs) -> ImageEncoder:
    name = config.model.name
    kwargs: dict[str, Any] = dict(compute=compute(config), rngs=rngs)
    if name == STORED:
        return Stored(config.model.width)
    if name == ALEXNET:
        return AlexNet(**kwargs)
    if name in RESNETS:
        return ResNet(resnet_stages(config), stem=config.model.stem, **kwargs)
    _, patch = parse_name(name)
    return ViT(
        encoder_size(config),
        patch=patch,
        image_size=config.data.image_size,
        options=encoder_options(config),
        keep=kept_tokens(config, tokens.ENCODER),
        **kwargs,
    )
