"""Encoders imported from elsewhere, and the conversion of ViTs."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax import nnx

from cap_pretrain import rules
from cap_pretrain.convert.tables import Table, to_ours
from cap_pretrain.convert.weights import Weights
from cap_pretrain.errors import UserError
from cap_pretrain.models.layers import Compute
from cap_pretrain.models.sizes import SIZES, Size
from cap_pretrain.models.vit import Options, Resample, ViT, resample_positions
from cap_pretrain.naflex import SQUARE
from cap_pretrain.untrusted import bounded, checked

MAX_WIDTH, MAX_DEPTH, MAX_MLP, MAX_HEADS = 2**15, 2**10, 2**17, 2**10
"""Largest sizes of an imported ViT; the largest published have 6144, 64, 24,576 and 48."""

MIN_STD, MAX_PIXEL = 1e-6, 1e6
"""Smallest deviation of pixels, and largest absolute value of mean and deviation, in a config."""

MAX_PATCH, MAX_GRID = 2**10, 2**8
"""Largest side of its patches in pixels, and largest number of patches along a side of an image."""

OURS = ((0.5,) * 3, (0.5,) * 3)  # mean and std that map pixels in [0, 1] to our [-1, 1]


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An encoder imported from elsewhere.

    Our version takes pixels in [-1, 1] and includes the normalization with `mean` and `std` of its
    own preprocessing: a ViT in the patch embedding of `params`.
    """

    model: dict[str, Any]  # fields of `config.model` for `build_encoder`, other than defaults
    image_size: int | None  # side of training images in pixels, whole patches; None: any size
    mean: tuple[float, ...]  # per channel (RGB), subtracted from pixels in [0, 1]
    std: tuple[float, ...]  # per channel, by which the difference is divided
    params: dict[str, Any]  # nested, float32
    source: str  # what it is, for messages
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)  # other variables
    resample: Resample = resample_positions  # for images of other sizes, of a ViT
    layout: str = SQUARE  # `data.layout` of its images
    text: bool = False  # whether the weights include a text tower, where no config says so


@dataclasses.dataclass(frozen=True)
class Form:
    """The architecture of a ViT; the attributes are arguments of `ViT`."""

    size: Size
    patch: int
    image_size: int
    options: Options

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter by path."""

        def build() -> ViT:
            fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
            return ViT(fields.pop("size"), **fields, compute=Compute(), rngs=nnx.Rngs(0))

        state = nnx.state(nnx.eval_shape(build), nnx.Param)
        return {k: v.shape for k, v in rules.flatten(nnx.to_pure_dict(state)).items()}

    def __str__(self) -> str:
        size = self.size
        return f"{size.width} wide, {size.depth} deep, patches of {self.patch}"

    def check(self, where: object) -> None:
        """Raise UserError if the numbers are not those of a ViT, or larger than the limits."""
        size, grid = self.size, self.image_size // max(self.patch, 1)
        for value, name, most in (
            (size.width, "width", MAX_WIDTH),
            (size.depth, "depth", MAX_DEPTH),
            (size.mlp, "width of the MLP", MAX_MLP),
            (size.heads, "number of heads", MAX_HEADS),
            (self.patch, "patch size", MAX_PATCH),
            (grid, "number of patches along a side", MAX_GRID),
        ):
            bounded(value, name, 1, most, where)
        if size.width % size.heads:
            raise UserError(
                f"{where}: {size.heads} attention heads do not divide the width {size.width}."
            )
        if self.options.positions == "rotary" and (head := size.width // size.heads) % 4:
            raise UserError(
                f"{where}: its heads have {head} channels, and rotary positions need a multiple "
                "of 4."
            )
        if self.options.positions == "sines" and size.width % 4:
            raise UserError(
                f"{where}: its width is {size.width}, and sine positions need a multiple of 4."
            )

    def fields(self) -> dict[str, Any]:
        """Return the fields of `config.model` that describe it, except for the image size."""
        name = next((name for name, size in SIZES.items() if size == self.size), None)
        numbers = dataclasses.asdict(self.size)
        if name:
            numbers = dict.fromkeys(numbers, 0)
        return {
            "name": f"{name or 'B'}/{self.patch}",
            **numbers,
            **dataclasses.asdict(self.options),
        }


def assemble(
    form: Form,
    weights: Weights,
    table: Table,
    *,
    ignored: Iterable[str],
    mean: Iterable[float],
    std: Iterable[float],
    source: str,
) -> Pretrained:
    """Read the parameters of a ViT; arguments and errors as for `to_ours` and `Pretrained`."""
    form.check(weights.where)
    flat = to_ours(weights, table, form.shapes(), ignored)
    mean, std = tuple(mean), tuple(std)
    if (mean, std) != OURS:
        kernel, bias = flat["patch_embedding/kernel"], flat["patch_embedding/bias"]
        flat |= zip(
            ("patch_embedding/kernel", "patch_embedding/bias"),
            fold_normalization(kernel, bias, mean, std),
            strict=True,
        )
    return Pretrained(
        model=form.fields(),
        image_size=form.image_size,
        mean=mean,
        std=std,
        params=nested(flat),
        source=f"{source} ({form})",
    )


def per_channel(value: Any, name: str, low: float, where: object) -> tuple[float, ...]:
    """Return three finite numbers from a config, each at least `low`; may raise UserError."""
    numbers = checked(value, name, (list, tuple), where)
    if len(numbers) != 3:
        raise UserError(f"{where}: {name!r} must be three numbers, found {len(numbers)}.")
    return tuple(bounded(n, name, low, MAX_PIXEL, where, kind=(int, float)) for n in numbers)


def fold_normalization(
    kernel: np.ndarray, bias: np.ndarray, mean: Iterable[float], std: Iterable[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Fold normalization into a patch embedding, so that it takes pixels in [-1, 1].

    The embedding (kernel [patch * patch * 3, D], channels last, and bias [D]) of (p - mean) / std,
    for pixels p in [0, 1], becomes one of 2 p - 1. Both are affine, so the result is exact except
    for rounding to float32 (a relative error of 2^-24), and no encoder needs a normalization of its
    own.
    """
    mean, std = (np.array(list(numbers), np.float64) for numbers in (mean, std))
    by_channel = kernel.astype(np.float64).reshape(-1, 3, kernel.shape[-1])
    scaled = by_channel / (2 * std)[:, None]
    shifted = bias + np.einsum("pcd,c->d", by_channel, (0.5 - mean) / std)
    return scaled.reshape(kernel.shape).astype(np.float32), shifted.astype(np.float32)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Return a nested dict of values by path: {"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
