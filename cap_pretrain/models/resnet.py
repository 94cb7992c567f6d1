"""ResNets (He et al. 2015, 1512.03385) as in torchvision.

This is "v1.5": the stride of a bottleneck is in its 3 x 3 convolution, not in the first 1 x 1.
"""

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from cap_pretrain.models.convnet import BatchNorm, ConvNet, convolution, imagenet, max_pool
from cap_pretrain.models.layers import Compute, constrain
from cap_pretrain.models.sizes import Stages

# First convolution: side of the kernel, stride, and whether max pooling follows. "imagenet" reduces
# each side to a quarter. "small" keeps the resolution, for images as in CIFAR (Chen et al. 2020,
# 2002.05709, appendix B.9).
STEMS = {"imagenet": (7, 2, True), "small": (3, 1, False)}


class Unit(nnx.Module):
    """A convolution with "same" padding, followed by BatchNorm.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: side of the kernel.
        stride: stride of the convolution.
        **kwargs: dtype and rngs.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, **kwargs: Any):
        self.conv = convolution(
            (inputs, outputs),
            kernel,
            stride=stride,
            padding=kernel // 2,
            bias=False,
            **kwargs,
        )
        self.norm = BatchNorm(outputs, rngs=kwargs["rngs"])

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map x [B, H, W, inputs] to [B, H / stride, W / stride, outputs]."""
        return self.norm(self.conv(x), train=train)


class Block(nnx.Module):
    """A residual block of two 3 x 3 convolutions, or of three convolutions as a bottleneck.

    Args:
        inputs: input channels.
        width: channels of the 3 x 3 convolution; a bottleneck has four times as many outputs.
        stride: stride of the block.
        bottleneck: whether it is a bottleneck.
        **kwargs: dtype and rngs.
    """

    def __init__(self, inputs: int, width: int, stride: int, *, bottleneck: bool, **kwargs: Any):
        if bottleneck:
            outputs = 4 * width
            self.unit_1 = Unit(inputs, width, 1, **kwargs)
            self.unit_2 = Unit(width, width, 3, stride, **kwargs)
            self.unit_3 = Unit(width, outputs, 1, **kwargs)
        else:
            outputs = width
            self.unit_1 = Unit(inputs, width, 3, stride, **kwargs)
            self.unit_2 = Unit(width, width, 3, **kwargs)
        self.bottleneck, self.projects = bottleneck, stride > 1 or inputs != outputs
        if self.projects:
            self.shortcut = Unit(inputs, outputs, 1, stride, **kwargs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map x [B, H, W, inputs] to [B, H / stride, W / stride, outputs]."""
        y = self.unit_2(nnx.relu(self.unit_1(x, train)), train)
        if self.bottleneck:
            y = self.unit_3(nnx.relu(y), train)
        return constrain(nnx.relu(y + (self.shortcut(x, train) if self.projects else x)))


class Stage(nnx.Module):
    """A sequence of blocks of one width, named block_1, block_2 and so on.

    Args:
        inputs: input channels.
        width: width of the blocks.
        stride: stride of the first block.
        depth: number of blocks.
        **kwargs: bottleneck, dtype and rngs.
    """

    def __init__(self, inputs: int, width: int, stride: int, *, depth: int, **kwargs: Any):
        outputs = 4 * width if kwargs["bottleneck"] else width
        self.names = tuple(f"block_{n + 1}" for n in range(depth))
        for n, name in enumerate(self.names):
            first = (inputs, width, stride)
            setattr(self, name, Block(*(outputs, width, 1) if n else first, **kwargs))

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map x [B, H, W, inputs] to [B, H / stride, W / stride, outputs]."""
        for name in self.names:
            x = getattr(self, name)(x, train)
        return x


class ResNet(ConvNet):
    """A ResNet without its classifier; its layers are stage_1 to stage_4.

    Args:
        stages: see `Stages`.
        stem: one of STEMS.
        compute: only its dtype is used.
    """

    def __init__(self, stages: Stages, *, stem: str, compute: Compute, rngs: nnx.Rngs):
        kwargs = dict(dtype=compute.dtype, rngs=rngs)
        side, stride, self.pools = STEMS[stem]
        self.stages, self.dtype = stages, compute.dtype
        inputs = stages.base
        self.stem = Unit(3, inputs, side, stride, **kwargs)
        for n, (name, outputs) in enumerate(self.layers.items()):
            stage = Stage(
                *(inputs, stages.base * 2**n, 2 if n else 1),
                depth=stages.depths[n],
                bottleneck=stages.bottleneck,
                **kwargs,
            )
            setattr(self, name, stage)
            inputs = outputs

    @property
    def width(self) -> int:  # type: ignore[override]  # read-only here
        """Channels of the last stage."""
        return self.stages.width

    @property
    def layers(self) -> dict[str, int]:  # type: ignore[override]  # read-only here
        """Channels of each stage, by name."""
        return {f"stage_{n + 1}": width for n, width in enumerate(self.stages.widths)}

    def _maps(self, images: jax.Array, train: bool) -> Iterator[jax.Array]:
        x = nnx.relu(self.stem(imagenet(images, self.dtype), train))
        if self.pools:
            x = max_pool(x, padding=1)
        for name in self.layers:
            x = getattr(self, name)(x, train)
            yield x
