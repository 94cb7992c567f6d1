"""AlexNet as in torchvision: the one-tower variant of Krizhevsky 2014 (1404.5997).

This is torchvision's `features`, five convolutions and three max poolings. The pooling to 6 x 6 and
the three fully connected layers that follow, with 58,631,144 of its 61,100,840 parameters, are
omitted.
"""

from collections.abc import Iterable, Iterator
from types import MappingProxyType

import jax
from flax import nnx

from cap_pretrain.models.convnet import ConvNet, convolution, imagenet, max_pool
from cap_pretrain.models.layers import Compute, constrain

# For each convolution: output channels, kernel side, stride, padding, whether max pooling follows.
_CONVOLUTIONS = (
    (64, 11, 4, 2, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)

WIDTH = _CONVOLUTIONS[-1][0]
SMALLEST = 63
"""Side in pixels of the smallest image that leaves a non-empty map after the three poolings."""


class AlexNet(ConvNet):
    """AlexNet's features; its layers conv1 to conv5 are the outputs of each ReLU.

    The tokens are the output of the last max pooling. This part of AlexNet has no dropout and no
    normalization.

    Args:
        compute: only its dtype is used.
    """

    width = WIDTH
    layers = MappingProxyType({f"conv{n + 1}": shape[0] for n, shape in enumerate(_CONVOLUTIONS)})

    def __init__(self, *, compute: Compute, rngs: nnx.Rngs):
        self.dtype = compute.dtype
        inputs = 3
        for name, (outputs, kernel, stride, padding, _) in self._shapes():
            conv = convolution(
                (inputs, outputs),
                kernel,
                stride=stride,
                padding=padding,
                bias=True,
                dtype=self.dtype,
                rngs=rngs,
            )
            setattr(self, name, conv)
            inputs = outputs

    def _shapes(self) -> Iterable[tuple[str, tuple[int, int, int, int, bool]]]:
        return zip(self.layers, _CONVOLUTIONS, strict=True)

    def _maps(
        self,
        images: jax.Array,
        train: bool,  # noqa: ARG002  # there is no BatchNorm
    ) -> Iterator[jax.Array]:
        x = imagenet(images, self.dtype)
        for name, (*_, pools) in self._shapes():
            x = constrain(nnx.relu(getattr(self, name)(x)))
            yield x
            if pools:
                x = max_pool(x)
        yield x
