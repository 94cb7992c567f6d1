"""Builds models from the `model` section of a config."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain.models.layers import Compute
from cap_pretrain.models.sizes import Size, parse_name
from cap_pretrain.models.vit import Options, ViT


def encoder_size(config: ConfigDict) -> Size:
    """The encoder's size: that of `model.name`, with any of its numbers overridden."""
    size, _ = parse_name(config.model.name)
    return _overridden(size, config)


def decoder_size(config: ConfigDict) -> Size:
    """The caption decoder's size: the encoder's with half its depth, any number overridden."""
    size = encoder_size(config)
    half = dataclasses.replace(size, depth=max(1, size.depth // 2))
    return _overridden(half, config, "decoder_")


def _overridden(size: Size, config: ConfigDict, prefix: str = "") -> Size:
    given = {f.name: config.model[prefix + f.name] for f in dataclasses.fields(Size)}
    return dataclasses.replace(size, **{name: n for name, n in given.items() if n})


def compute(config: ConfigDict) -> Compute:
    """How the model computes: precision, attention kernel, rematerialisation, dropout."""
    model = config.model
    auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return Compute(
        dtype=jnp.dtype(auto if config.dtype == "auto" else config.dtype),
        attention=model.attention,
        remat=model.remat,
        unroll=model.unroll,
        dropout=model.dropout,
        stochastic_depth=model.stochastic_depth,
        deterministic=config.deterministic,
    )


def encoder_options(config: ConfigDict) -> Options:
    """The encoder's options, which have the names of the config's fields."""
    return Options(**{f.name: config.model[f.name] for f in dataclasses.fields(Options)})


def build_encoder(config: ConfigDict, rngs: nnx.Rngs) -> ViT:
    """Builds the image encoder of a config."""
    _, patch = parse_name(config.model.name)
    return ViT(
        encoder_size(config),
        patch=patch,
        image_size=config.data.image_size,
        options=encoder_options(config),
        compute=compute(config),
        rngs=rngs,
    )
