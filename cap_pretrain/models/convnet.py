"""Base of convolutional encoders: ImageNet normalization, torch's padding and BatchNorm.

The encoders accept images of any size and compute the same as torchvision's, so weights can be
converted (see `cap_pretrain.convert`). Unlike the transformers, they do not scan over a stack of
blocks. Convolutions compile to library calls, so the 23 equal blocks of a ResNet-101 compile no
slower unrolled, and in a loop its backward pass took five times as long on CPU. `model.remat` and
`model.unroll` therefore do not apply.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.models.layers import EncoderOutput

# Mean and standard deviation of red, green and blue in [0, 1] over ImageNet's training images, used
# by all models of torchvision (documentation, "Models and pre-trained weights") and VISSL.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# He et al. 2015 (1502.01852), fan-out mode, the initialization of torchvision's ResNets.
_HE = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNet(ImageEncoder):
    """An encoder whose tokens are its last feature map in row-major order, with mean pooling."""

    def _maps(self, images: jax.Array, train: bool) -> Iterator[jax.Array]:
        """Yield the feature maps [B, H', W', D'] of `layers`, and optionally one more.

        The last map becomes the tokens.

        Args:
            images: [B, H, W, 3] in [-1, 1].
            train: Whether BatchNorm is in training mode.
        """
        raise NotImplementedError

    def _encode(
        self,
        images: jax.Array,
        *,
        train: bool,
        key: jax.Array | None,  # noqa: ARG002  # there is no dropout
    ) -> EncoderOutput:
        *_, last = self._maps(images, train)
        tokens = _rows(last)
        return EncoderOutput(tokens, jnp.mean(tokens, axis=1))

    def _tokens_at(self, layer: str, images: jax.Array) -> jax.Array:
        for name, feature_map in zip(self.layers, self._maps(images, train=False), strict=False):
            if name == layer:
                return _rows(feature_map)
        raise KeyError(layer)


def imagenet(images: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Normalize images [..., 3] in [-1, 1] as ImageNet models expect.

    Unlike a ViT's patch embedding, the first convolution cannot absorb the normalization, because
    it pads with zeros after it.
    """
    unit = (images.astype(jnp.float32) + 1) / 2
    return ((unit - jnp.array(MEAN)) / jnp.array(STD)).astype(dtype)


def convolution(
    channels: tuple[int, int],
    kernel: int,
    *,
    stride: int = 1,
    padding: int,
    bias: bool,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Return a convolution with a square kernel and `padding` zeros on each side, as in torch.

    Args:
        channels: Input and output channels.
        kernel: Side of the kernel.
        stride: Stride in both directions.
        padding: Zeros on each side.
        bias: Whether there is a bias.
        dtype: Computation dtype.
        rngs: Random keys for the parameters.
    """
    return nnx.Conv(
        *channels,
        (kernel, kernel),
        strides=stride,
        padding=((padding, padding),) * 2,
        use_bias=bias,
        kernel_init=_HE,
        dtype=dtype,
        conv_general_dilated=convolved,
        rngs=rngs,
    )


def convolved(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **kwargs: Any,
) -> jax.Array:
    """Compute `jax.lax.conv_general_dilated` of x [B, H, W, D] and kernel [h, w, D, D'].

    If the kernel is larger than the output map, as in the last stage on small images, the
    convolution is computed as a matrix product. XLA's CPU compiler would swap kernel and map in one
    of the passes, which takes ten times as long.
    """
    ends = [
        size + sum(pads) - side
        for size, pads, side in zip(x.shape[1:3], padding, kernel.shape, strict=False)
    ]
    counts = [end // stride + 1 for end, stride in zip(ends, strides, strict=True)]
    if math.prod(counts) >= math.prod(kernel.shape[:2]):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **kwargs)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        [slice(n, n + stride * (count - 1) + 1, stride) for n in range(side)]
        for side, stride, count in zip(kernel.shape, strides, counts, strict=False)
    )
    patches = [x[:, row, column] for row in rows for column in columns]
    return jnp.concatenate(patches, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class BatchNorm(nnx.BatchNorm):
    """Batch normalization with torch's constants: momentum 0.1 (of the new value), epsilon 1e-5.

    As in torch, the running variance uses the unbiased estimate. Statistics are those of the global
    batch, however it is sharded. Statistics and normalization are computed in float32.

    Args:
        width: number of channels.
        affine: whether there is a learned scale and shift.
        rngs: required by `nnx.BatchNorm`.

    Attributes:
        frozen: Whether to compute as in evaluation during training, too, without updating the
            statistics. Set by `learners.build`.
    """

    frozen = False

    def __init__(self, width: int, *, affine: bool = True, rngs: nnx.Rngs):
        super().__init__(
            width,
            momentum=0.9,
            epsilon=1e-5,
            dtype=jnp.float32,
            use_bias=affine,
            use_scale=affine,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:  # type: ignore[override]  # torch
        """Normalize x [..., D] with statistics over all axes but the last."""
        train = train and not self.frozen
        kept = self.momentum * self.var[...]
        y = super().__call__(x, use_running_average=not train)
        if train:
            count = x.size // x.shape[-1]
            self.var[...] = kept + (self.var[...] - kept) * (count / max(count - 1, 1))
        return y.astype(x.dtype)


def max_pool(x: jax.Array, *, padding: int = 0) -> jax.Array:
    """Max-pool x [B, H, W, D] with window 3 x 3 and stride 2, padding with -inf.

    It takes the maximum of slices, first over rows, then over columns, because the gradient of
    `nnx.max_pool` is several times as slow on CPUs. Equal maxima share the gradient.
    """
    edges = (padding, padding)
    x = jnp.pad(x, ((0, 0), edges, edges, (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        end = x.shape[axis] - 2  # of the first element of each window
        parts = (jax.lax.slice_in_dim(x, n, end + n, 2, axis) for n in range(3))
        x = functools.reduce(jnp.maximum, parts)
    return x


def _rows(x: jax.Array) -> jax.Array:
    """Flatten [B, H, W, D] to [B, H * W, D]."""
    return x.reshape(len(x), -1, x.shape[-1])
