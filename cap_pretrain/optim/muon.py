"""Muon (Jordan et al. 2024): Newton-Schulz iterations orthogonalize the momentum of matrices.

Only the matrices inside a network are updated so. Input and output layers, embeddings, positions,
scales and biases are left to Adam, as its authors recommend (https://kellerjordan.github.io/posts/muon).
"""

import dataclasses
import math
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from cap_pretrain import rules
from cap_pretrain.errors import UserError

# The first match says how a parameter is updated. Input layers are those of patches and the first
# convolutions of ResNet and AlexNet; output layers predict tokens, classes, pixels or prototypes.
KINDS = (
    (r"(.*/)?(patch_embedding|stem/conv|conv1|logits|head|pixels|prototypes)/kernel", "adam"),
    (r"(.*/)?kernel", "muon"),
)


@dataclasses.dataclass(frozen=True)
class Muon:
    """Settings of `config.optim.muon`, for the matrices that Muon updates.

    Attributes:
        momentum: Decay rate of the momentum, of Nesterov's form.
        steps: Newton-Schulz iterations.
        rms: Root mean square of the update of every matrix, before the learning rate. 0.2 is about
            that of Adam, so rates of AdamW can be kept (Liu et al. 2025, 2502.16982, section 2.2).
            0 scales an update [in, out] by sqrt(max(1, out / in)) instead, as Jordan et al. do; it
            takes rates around 0.02.
    """

    momentum: float = 0.95
    steps: int = 5
    rms: float = 0.2

    def __post_init__(self):
        if not 0 <= self.momentum < 1:
            raise UserError(f"optim.muon.momentum: {self.momentum} is not in [0, 1).")
        if self.steps < 1:
            raise UserError(f"optim.muon.steps: {self.steps} must be at least 1.")
        if self.rms < 0:
            raise UserError(f"optim.muon.rms: {self.rms} must not be negative.")


def muon(
    options: Muon, adam: optax.GradientTransformation, moment_dtype: Any = None
) -> optax.GradientTransformation:
    """Return Muon's scaling for matrices, and `adam` for all other parameters.

    Args:
        options: Settings of Muon.
        adam: Scaling of the other parameters.
        moment_dtype: Dtype of the momentum. None is that of the parameters.
    """
    matrices = optax.chain(
        scale_by_muon(
            ns_steps=options.steps,
            beta=options.momentum,
            mu_dtype=moment_dtype,
            weight_dimension_numbers=_dimensions,
        ),
        optax.stateless(lambda updates, _: jax.tree.map(_scaler(options.rms), updates)),
    )
    return optax.partition({"muon": matrices, "adam": adam}, _kinds)


def _kinds(params: Any) -> Any:
    return rules.apply_rules(KINDS, params, default="adam", field="optim", strict=False)


def _axes(shape: tuple[int, ...]) -> MuonDimensionNumbers:
    """Return which axes of a kernel are the inputs and the outputs of a matrix.

    A convolution [H, W, in, out] is one matrix [H * W * in, out]. Of stacked layers
    [depth, in, out] each is a matrix.
    """
    inputs = (-4, -3, -2) if len(shape) > 3 else (-2,)
    return MuonDimensionNumbers(inputs, (-1,))


def _dimensions(params: Any) -> Any:
    return jax.tree.map(lambda p: _axes(p.shape), params)


def _scaler(rms: float) -> Any:
    """Return a function that scales an orthogonal matrix of `_axes`; see `Muon.rms`."""

    def scale(update: jax.Array) -> jax.Array:
        shape = update.shape
        inputs = math.prod(shape[axis] for axis in _axes(shape).reduction_axis)
        if rms:
            return update * (rms * math.sqrt(max(inputs, shape[-1])))
        return update * math.sqrt(max(1.0, shape[-1] / inputs))

    return scale
