"""What convolutional encoders have in common: ImageNet's colours, padding and BatchNorm of torch.

They take images of any size, and compute what torchvision's do, so that weights can travel (see
convert). Their blocks are no scanned stack as those of transformers: convolutions compile to calls
of a library, so that a ResNet-101 of 23 equal blocks compiles no slower written out, and in a loop
its backward pass took five times as long on CPU. So `model.remat` and `model.unroll` are nothing to
them.
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

# Of red, green and blue in [0, 1], over ImageNet's training images: what every model of torchvision
# (its documentation, "Models and pre-trained weights") and of VISSL subtracts and divides by.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# He et al. 2015 (1502.01852), for the backward pass, as torchvision's ResNets begin.
_HE = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNet(ImageEncoder):
    """An encoder whose tokens are its last feature map, row by row, and pooled the mean of them."""

    def _maps(self, images: jax.Array, train: bool) -> Iterator[jax.Array]:
        """Feature maps [B, H', W', D'] of each of `layers`, and what else there is behind them.

        Args:
          images: [B, H, W, 3], as `imagenet` makes them.
          train: whether BatchNorm is in training.
        """
        raise NotImplementedError

    def _encode(self, images: jax.Array, *, train: bool, key: jax.Array | None) -> EncoderOutput:
        *_, last = self._maps(images, train)
        tokens = _rows(last)
        return EncoderOutput(tokens, jnp.mean(tokens, axis=1))

    def _tokens_at(self, layer: str, images: jax.Array) -> jax.Array:
        for name, found in zip(self.layers, self._maps(images, train=False), strict=False):
            if name == layer:
                return _rows(found)
        raise KeyError(layer)


def imagenet(images: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[..., 3] in [-1, 1] -> as networks of ImageNet take them.

    The first convolution could not do this along with its own work, as a ViT's can: its padding is
    zeros behind the normalisation.
    """
    unit = (images.astype(jnp.float32) + 1) / 2
    return ((unit - jnp.array(MEAN)) / jnp.array(STD)).astype(dtype)


def convolution(
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    stride: int = 1,
    padding: int,
    bias: bool,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution with a square kernel, and `padding` zeros on each side, as torch has it."""
    return nnx.Conv(
        inputs,
        outputs,
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
    """What `jax.lax.conv_general_dilated` gives, of x [B, H, W, D] and kernel [h, w, D, D'].

    Where the kernel is larger than the map it makes, as in the last stage of small images, it is a
    matrix product: XLA's compiler for CPUs exchanges the two there, in one of the passes, which
    takes ten times as long.
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
    seen = [x[:, row, column] for row in rows for column in columns]
    return jnp.concatenate(seen, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation with the constants of torch: momentum 0.1 (of the new), epsilon 1e-5.

    As there, the running variance is of the unbiased estimate. A batch is the global one, however
    it lies on the mesh. Statistics are float32, as is what is computed from them.

    Attributes:
      frozen: whether it computes as in evaluation in training, too, its statistics unmoved;
        `learners.build` sets it.
    """

    frozen = False

    def __init__(self, width: int, *, affine: bool = True, rngs: nnx.Rngs):
        """`affine`: whether it learns a scale and a shift."""
        super().__init__(
            width,
            momentum=0.9,
            epsilon=1e-5,
            dtype=jnp.float32,
            use_bias=affine,
            use_scale=affine,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x [..., D] -> [..., D]; statistics are over all other axes."""
        train = train and not self.frozen
        kept = self.momentum * self.var[...]
        y = super().__call__(x, use_running_average=not train)
        if train:
            count = x.size // x.shape[-1]
            self.var[...] = kept + (self.var[...] - kept) * (count / max(count - 1, 1))
        return y.astype(x.dtype)


def max_pool(x: jax.Array, *, padding: int = 0) -> jax.Array:
    """[B, H, W, D]: the largest of 3 x 3, every second; beyond the edges there is nothing.

    Rows first, then columns, of slices: the gradient of `nnx.max_pool` is several times as slow on
    CPUs. Where the largest are equal, they share the gradient.
    """
    edges = (padding, padding)
    x = jnp.pad(x, ((0, 0), edges, edges, (0, 0)), constant_values=-jnp.inf)
    for axis in (1, 2):
        end = x.shape[axis] - 2  # of the windows' beginnings
        parts = (jax.lax.slice_in_dim(x, n, end + n, 2, axis) for n in range(3))
        x = functools.reduce(jnp.maximum, parts)
    return x


def _rows(x: jax.Array) -> jax.Array:
    """[B, H, W, D] -> [B, H * W, D]."""
    return x.reshape(len(x), -1, x.shape[-1])
