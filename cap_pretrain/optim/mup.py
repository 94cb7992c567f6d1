"""muP (Yang et al. 2022, 2203.03466): learning rates and initial scales for networks of any width.

With optimizers whose update does not depend on the scale of the gradient, all that muP asks for can
be expressed by these two, so a network computes what it always does and is exported as always: a
factor f on an input of a product, such as 1/d instead of 1/sqrt(d) in attention, is the same as a
kernel that begins with f times its values and learns with f times the rate.
"""

import dataclasses
import math
import re
from typing import Any

import jax

from cap_pretrain import rules
from cap_pretrain.errors import UserError

OPTIMIZERS = ("adamw", "adafactor", "lion")
"""The optimizers with such updates."""

# Parameters that are initialized with a variance of 1 / width, or of Xavier ("probe"), and have to
# keep it: inputs of the residual stream.
INPUTS = r"(.*/)?(positions|text_positions|class_token|probe|text_tower/embedding/embedding)"
# Of attention by products; that of recurrent decoders adds queries and keys.
QUERY = r"(.*/)?(cross_)?attention/query/(kernel|bias)"
# What `models.mlp.XAVIER` initializes, with a variance of 2 / (inputs + outputs).
XAVIER = (
    r"(.*/)?((cross_)?attention/(query|key|value|out)|mlp/(up|gate|down)|connector|pixels"
    r"|(image|text)_projection|layer\d|prototypes)/kernel|(.*/)?probe"
)


@dataclasses.dataclass(frozen=True)
class Mup:
    """Settings of `config.optim.mup`: the model for which `optim.lr` was chosen.

    Attributes:
        base_width: Width of a model of the same depth, for which `optim.lr` is good. All widths are
            taken to be scaled together: those of MLPs, decoder and text tower, too. 0 disables muP.
        base_heads: Number of attention heads of that model's encoder, a ViT. 0 is as many as give
            heads of the same size as now. Those of a decoder or text tower are taken to be in the
            same proportion to its present ones.
    """

    base_width: int = 0
    base_heads: int = 0

    def check(self, optimizer: str) -> None:
        """Raise UserError if the settings are invalid, or are not for `optim.name`."""
        for field, value in dataclasses.asdict(self).items():
            if value < 0:
                raise UserError(f"optim.mup.{field}: {value} must not be negative.")
        if not self.base_width:
            return
        if self.base_heads and self.base_width % self.base_heads:
            raise UserError(
                f"optim.mup.base_heads: {self.base_heads} does not divide "
                f"optim.mup.base_width={self.base_width}; choose a divisor."
            )
        if optimizer not in OPTIMIZERS:
            raise UserError(
                f"optim.mup.base_width: is for {', '.join(OPTIMIZERS)}, not for "
                f"optim.name={optimizer}; set it to 0."
            )

    def query(self, head: int) -> float:
        """Return the factor of queries that turns 1/sqrt(d) into 1/d, for heads of size `head`."""
        return math.sqrt(self.base_width / self.base_heads / head) if self.base_heads else 1.0


def rates(shapes: Any, base: Any, query: float) -> Any:
    """Return the factor on the update of each parameter (table 8, and the row of Adam).

    Args:
        shapes: Parameters or their abstract shapes.
        base: The same of the base model.
        query: See `Mup.query`.
    """

    def rate(path, p, b):
        name = rules.path_string(path)
        factor = b.shape[-2] / p.shape[-2] if name.endswith("kernel") else 1.0
        return factor * (query if _matches(QUERY, name) else 1.0)

    return jax.tree_util.tree_map_with_path(rate, shapes, base)


def initial(params: Any, base: Any, query: float) -> Any:
    """Return the initial parameters of muP for those of the usual initialization.

    Kernels of hidden layers keep their variance, which is in proportion to 1 / inputs. Those of
    output layers, whose outputs do not grow with the width, get one in
    proportion to 1 / inputs^2. Input layers and `INPUTS` get that of the base model.
    """

    def scale(path, p, b):
        name, factor = rules.path_string(path), 1.0
        kernel = name.endswith("kernel")
        hidden = kernel and p.shape[-2] != b.shape[-2] and p.shape[-1] != b.shape[-1]
        if (kernel and not hidden) or _matches(INPUTS, name):
            factor = (variance(name, b.shape) / variance(name, p.shape)) ** 0.5
            factor *= b.shape[-2] / p.shape[-2] if kernel else 1.0
        factor *= query if _matches(QUERY, name) else 1.0
        return p if factor == 1 else p * factor

    return jax.tree_util.tree_map_with_path(scale, params, base)


def variance(name: str, shape: tuple[int, ...]) -> float:
    """Return the initial variance of a kernel or of one of `INPUTS`, up to a constant factor."""
    inputs = shape[-2] if name.endswith("kernel") else shape[-1]
    return 2 / (shape[-2] + shape[-1]) if _matches(XAVIER, name) else 1 / inputs


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(pattern, name) is not None
