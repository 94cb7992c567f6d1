"""AlexNet as torchvision has it: the one-tower variant of Krizhevsky 2014 (1404.5997).

Of it, this is `features`: five convolutions and three max poolings. The pooling to 6 x 6 and the
three fully connected layers that follow, 58,631,144 of its 61,100,840 parameters, are left out.
"""

from collections.abc import Iterator

import jax
from flax import nnx

from cap_pretrain.models.convnet import ConvNet, convolution, imagenet, max_pool
from cap_pretrain.models.layers import Compute, constrain

# Of each convolution: channels out, side of the kernel, stride, padding, whether a max pooling
# follows.
_CONVOLUTIONS = (
    (64, 11, 4, 2, True),
    (192, 5, 1, 2, True),
    (384, 3, 1, 1, False),
    (256, 3, 1, 1, False),
    (256, 3, 1, 1, True),
)

WIDTH = _CONVOLUTIONS[-1][0]
SMALLEST = 63
"""Side in pixels of the smallest images of which something is left by the three poolings."""


class AlexNet(ConvNet):
    """AlexNet's features; its layers conv1 to conv5 are those behind each ReLU.

    The tokens are what is left by the max pooling behind the last. There is no dropout and no
    normalisation in this part of it.

    Args:
      compute: of which the dtype counts.
    """

    width = WIDTH
    layers = {f"conv{n + 1}": shape[0] for n, shape in enumerate(_CONVOLUTIONS)}

    def __init__(self, *, compute: Compute, rngs: nnx.Rngs):
        self.dtype = compute.dtype
        inputs = 3
        for name, (outputs, kernel, stride, padding, _) in self._shapes():
            conv = convolution(
                *(inputs, outputs, kernel),
                stride=stride,
                padding=padding,
                bias=True,
                dtype=self.dtype,
                rngs=rngs,
            )
            setattr(self, name, conv)
            inputs = outputs

    def _shapes(self):
        return zip(self.layers, _CONVOLUTIONS, strict=True)

    def _maps(self, images: jax.Array, train: bool) -> Iterator[jax.Array]:
        x = imagenet(images, self.dtype)
        for name, (*_, pools) in self._shapes():
            x = constrain(nnx.relu(getattr(self, name)(x)))
            yield x
            if pools:
                x = max_pool(x)
        yield x
