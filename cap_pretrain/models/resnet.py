"""ResNets (He et al. 2015, 1512.03385) as torchvision has them.

That is "v1.5": of a bottleneck, the 3 x 3 convolution has the stride, not the first 1 x 1.
"""

from collections.abc import Iterator

import jax
from flax import nnx

from cap_pretrain.models.convnet import BatchNorm, ConvNet, convolution, imagenet, max_pool
from cap_pretrain.models.layers import Compute, constrain
from cap_pretrain.models.sizes import Stages

# What the images enter by: the side of the kernel, its stride, whether a max pooling follows.
# "imagenet" leaves a quarter of each side. "small" leaves all, for images as of CIFAR (Chen et al.
# 2020, 2002.05709, appendix B.9).
STEMS = {"imagenet": (7, 2, True), "small": (3, 1, False)}


class Unit(nnx.Module):
    """A convolution, as much padding as leaves the size (but for the stride), and a BatchNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, **kwargs):
        self.conv = convolution(
            *(inputs, outputs, kernel),
            stride=stride,
            padding=kernel // 2,
            bias=False,
            **kwargs,
        )
        self.norm = BatchNorm(outputs, rngs=kwargs["rngs"])

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return self.norm(self.conv(x), train=train)


class Block(nnx.Module):
    """Two 3 x 3 convolutions, or three as a bottleneck, and what they are added to.

    Args:
      inputs: channels that come in.
      width: channels of the 3 x 3 convolution; a bottleneck gives four times as many.
      stride: of the block.
      bottleneck: whether it is one.
      kwargs: dtype and rngs.
    """

    def __init__(self, inputs: int, width: int, stride: int, *, bottleneck: bool, **kwargs):
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
        """x [B, H, W, inputs] -> [B, H / stride, W / stride, outputs]."""
        y = self.unit_2(nnx.relu(self.unit_1(x, train)), train)
        if self.bottleneck:
            y = self.unit_3(nnx.relu(y), train)
        return constrain(nnx.relu(y + (self.shortcut(x, train) if self.projects else x)))


class Stage(nnx.Module):
    """Blocks of one width, of which the first may have a stride: block_1, block_2, …"""

    def __init__(self, inputs: int, width: int, stride: int, *, depth: int, **kwargs):
        outputs = 4 * width if kwargs["bottleneck"] else width
        self.names = tuple(f"block_{n + 1}" for n in range(depth))
        for n, name in enumerate(self.names):
            first = (inputs, width, stride)
            setattr(self, name, Block(*(outputs, width, 1) if n else first, **kwargs))

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for name in self.names:
            x = getattr(self, name)(x, train)
        return x


class ResNet(ConvNet):
    """A ResNet without its classifier; its layers are stage_1 to stage_4.

    Args:
      stages: see `Stages`.
      stem: one of STEMS.
      compute: of which the dtype counts.
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
    def width(self) -> int:
        return self.stages.width

    @property
    def layers(self) -> dict[str, int]:
        return {f"stage_{n + 1}": width for n, width in enumerate(self.stages.widths)}

    def _maps(self, images: jax.Array, train: bool) -> Iterator[jax.Array]:
        x = nnx.relu(self.stem(imagenet(images, self.dtype), train))
        if self.pools:
            x = max_pool(x, padding=1)
        for name in self.layers:
            x = getattr(self, name)(x, train)
            yield x
