"""Named sizes of transformers and convolutional networks."""

import dataclasses

from cap_pretrain.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Size:
    """Shape of a transformer.

    Attributes:
        width: D, width of the tokens.
        depth: Number of layers.
        mlp: Hidden units of the MLP.
        heads: Number of attention heads.
    """

    width: int
    depth: int
    mlp: int
    heads: int


# mu: ours, for tests. B, L, H: Dosovitskiy et al. 2020 (2010.11929); Ti, S: Touvron et al. 2020
# (2012.12877); M: Tschannen et al. 2023 (2306.07915); So400m: Alabdulmohsin et al. 2023
# (2305.13035); g: Zhai et al. 2021 (2106.04560).
SIZES = {
    "mu": Size(64, 2, 256, 2),
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "M": Size(512, 12, 2048, 8),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "So400m": Size(1152, 27, 4304, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
}


@dataclasses.dataclass(frozen=True)
class Stages:
    """Shape of a ResNet.

    Attributes:
        depths: Number of blocks of each stage.
        bottleneck: Whether the blocks are bottlenecks.
        base: Channels of the first convolution and of the 3 x 3 convolutions of the first stage.
            Each further stage has twice as many.
    """

    depths: tuple[int, int, int, int]
    bottleneck: bool
    base: int = 64

    @property
    def widths(self) -> tuple[int, ...]:
        """Output channels of each stage."""
        first = 4 * self.base if self.bottleneck else self.base
        return tuple(first * 2**n for n in range(len(self.depths)))

    @property
    def width(self) -> int:
        """Output channels of the last stage."""
        return self.widths[-1]


# He et al. 2015 (1512.03385), table 1.
RESNETS = {
    "resnet18": Stages((2, 2, 2, 2), bottleneck=False),
    "resnet34": Stages((3, 4, 6, 3), bottleneck=False),
    "resnet50": Stages((3, 4, 6, 3), bottleneck=True),
    "resnet101": Stages((3, 4, 23, 3), bottleneck=True),
    "resnet152": Stages((3, 8, 36, 3), bottleneck=True),
}
ALEXNET = "alexnet"
CONVNETS = (*RESNETS, ALEXNET)
STORED = "stored"  # no encoder: the dataset contains features


def parse_name(name: str) -> tuple[Size, int]:
    """Parse the name of a ViT: `"B/16"` is (the size B, patch size 16).

    Raises:
        UserError: The name is not that of a ViT.
    """
    variant, _, patch = name.partition("/")
    if variant not in SIZES:
        near = did_you_mean(variant, (*SIZES, *CONVNETS, STORED))
        raise UserError(f"model.name: no size {variant!r}.{near}")
    if not patch.isdigit() or int(patch) < 1:
        raise UserError(f"model.name: {name!r} lacks a patch size; write it as {variant}/16.")
    return SIZES[variant], int(patch)
