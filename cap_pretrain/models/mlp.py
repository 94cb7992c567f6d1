"""What differs between the blocks of families of transformers: MLPs, normalization, biases."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from cap_pretrain.models import cpu
from cap_pretrain.models.compute import Compute
from cap_pretrain.models.elementwise import LayerNorm, RMSNorm, gelu_tanh, silu

XAVIER = nnx.initializers.xavier_uniform()

# By their names in a config. The default is the tanh approximation, as in the authors' code.
# quick_gelu is CLIP's (Radford et al. 2021, `model.py` of their code). silu is usual in gated MLPs.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": functools.partial(nnx.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": silu,
}


@dataclasses.dataclass(frozen=True)
class Details:
    """Details in which encoder blocks of one size differ between model families.

    Attributes:
        activation: Activation of the MLP, one of ACTIVATIONS.
        norm_eps: Constant that normalization adds to the variance or the mean square.
        norm: One of NORMS: "layer" normalization, or "rms", which divides by the root mean square
            and has no bias (Zhang and Sennrich 2019, 1910.07467).
        gated: Whether the hidden units of an MLP are activation(gate(x)) * up(x), with a third
            linear layer, in place of activation(up(x)) (Shazeer 2020, 2002.05202).
        bias: Whether the linear layers of the blocks have biases.
    """

    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    norm: str = "layer"
    gated: bool = False
    bias: bool = True

    def normalization(self, width: int, compute: Compute, rngs: nnx.Rngs) -> nnx.Module:
        """Return a layer that normalizes [..., width]."""
        return NORMS[self.norm](width, epsilon=self.norm_eps, dtype=compute.dtype, rngs=rngs)


NORMS: dict[str, Callable[..., nnx.Module]] = {"layer": LayerNorm, "rms": RMSNorm}


class Mlp(nnx.Module):
    """Two linear layers with an activation between them, or three of a gated MLP.

    Args:
        width: width of input and output.
        hidden: number of hidden units.
        bias: whether the linear layers have biases.
        activation: one of ACTIVATIONS.
        gated: see `Details`.
        compute: precision.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        bias: bool,
        activation: str = Details.activation,
        gated: bool = False,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        kwargs = dict(
            use_bias=bias,
            dtype=compute.dtype,
            kernel_init=XAVIER,
            bias_init=nnx.initializers.normal(1e-6),
            rngs=rngs,
        )
        self.up = cpu.Linear(width, hidden, **kwargs)
        self.down = cpu.Linear(hidden, width, **kwargs)
        if gated:
            self.gate = cpu.Linear(width, hidden, **kwargs)
        self.activation, self.gated = activation, gated

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x [..., D] to [..., D]."""
        activate, hidden = ACTIVATIONS[self.activation], checkpoint_name(self.up(x), "hidden")
        if not self.gated:
            return self.down(activate(hidden))
        return self.down(activate(checkpoint_name(self.gate(x), "hidden")) * hidden)


def mlp_of(width: int, hidden: int, details: Details, *, compute: Compute, rngs: nnx.Rngs) -> Mlp:
    """Return the MLP of an encoder block with these details."""
    return Mlp(
        width,
        hidden,
        bias=details.bias,
        activation=details.activation,
        gated=details.gated,
        compute=compute,
        rngs=rngs,
    )
