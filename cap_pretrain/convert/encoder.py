"""An encoder that was made elsewhere, and how a ViT becomes ours."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from flax import nnx

from cap_pretrain import rules
from cap_pretrain.convert.tables import Table, to_ours
from cap_pretrain.convert.weights import Weights
from cap_pretrain.models.layers import Compute
from cap_pretrain.models.sizes import SIZES, Size
from cap_pretrain.models.vit import Options, ViT

# Of pixels in [0, 1], what makes them values in [-1, 1], as our models take them.
OURS = ((0.5,) * 3, (0.5,) * 3)


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """An encoder that was made elsewhere.

    Attributes:
      model: fields of `config.model` with which `build_encoder` makes it; others have defaults.
      image_size: side in pixels of the images it was made for, a multiple of its patch size; None
        if it takes any.
      mean, std: of red, green and blue in [0, 1]: what its own preprocessing subtracts and divides
        by. Ours does so itself, and takes values in [-1, 1]: a ViT by its patch embedding in
        `params`.
      params: nested dict of float32 arrays.
      source: what it was, for people.
      stats: other variables, as `params`.
    """

    model: dict[str, Any]
    image_size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    params: dict[str, Any]
    source: str
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Form:
    """The shape of a ViT: see `ViT`."""

    size: Size
    patch: int
    image_size: int
    options: Options

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter by path."""

        def build() -> ViT:
            fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
            return ViT(fields.pop("size"), **fields, compute=Compute(), rngs=nnx.Rngs(0))

        state = nnx.state(nnx.eval_shape(build), nnx.Param)
        return {k: v.shape for k, v in rules.flatten(nnx.to_pure_dict(state)).items()}

    def __str__(self) -> str:
        size = self.size
        return f"{size.width} wide, {size.depth} deep, patches of {self.patch}"

    def fields(self) -> dict[str, Any]:
        """The fields of `config.model` that say all this but the image size."""
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
    """Reads the parameters of a ViT of this form; arguments as for `to_ours` and `Pretrained`.

    Raises:
      UserError: as `to_ours`.
    """
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


def fold_normalization(
    kernel: np.ndarray, bias: np.ndarray, mean: Iterable[float], std: Iterable[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Makes a patch embedding of (p - mean) / std, p in [0, 1], one of 2 p - 1.

    Both are affine, so this is exact but for the rounding of the new numbers to float32, 2^-24 of
    each. In exchange no encoder needs a normalisation of its own, wherever it goes.

    Args:
      kernel: [patch * patch * 3, D], channels last.
      bias: [D].
      mean, std: of the three channels.
    """
    mean, std = (np.array(list(numbers), np.float64) for numbers in (mean, std))
    by_channel = kernel.astype(np.float64).reshape(-1, 3, kernel.shape[-1])
    scaled = by_channel / (2 * std)[:, None]
    shifted = bias + np.einsum("pcd,c->d", by_channel, (0.5 - mean) / std)
    return scaled.reshape(kernel.shape).astype(np.float32), shifted.astype(np.float32)


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
