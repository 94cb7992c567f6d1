"""How models compute: precision, attention kernel, rematerialization, dropout."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cap_pretrain.models.attention import ATTENDED, WEIGHTS


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model computes: precision, kernels, rematerialization and regularization.

    Attributes:
        dtype: Dtype of activations, and of parameters when they enter a product.
        attention: "xla", "cudnn" (fused, GPU only), "recompute" or "keep" (explicit gradients; see
            models/attention.py), or "auto": cudnn where supported, keep on TPUs, a form for CPUs
            there (models/cpu.py), otherwise xla.
        remat: Rematerialization policy. "none" recomputes nothing. "full" recomputes everything but
            the layer inputs. "dots" keeps the results of matrix products. "lean" keeps the inputs
            and outputs of attention and the MLP's hidden units before their activation. "auto" is
            lean on TPUs, otherwise none (training on GPUs settles it before; see
            training/automatic.py).
        unroll: Layers per iteration of the scan over depth. The depth itself unrolls the whole
            stack. 0 does so on TPUs, on GPUs unless remat is "full", and on CPUs from six
            layers; otherwise it is 1.
        logit_chunks: Number of chunks of a text for which the logits of a loss are computed
            sequentially.
        dropout: Dropout rate after attention and MLP.
        stochastic_depth: Rate of dropping a residual branch, growing linearly with depth.
        deterministic: Whether gradients must be reproducible bit by bit on GPUs.
    """

    dtype: Any = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    unroll: int = 1
    logit_chunks: int = 1
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    deterministic: bool = False


# Names of the activations that "lean" keeps, assigned below. Normalization and activation functions
# are cheap: on a TPU, recomputing them is faster than storing and loading their results.
KEPT = (WEIGHTS, "query", "key", "value", ATTENDED, "out", "hidden")


def _is_fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keep what cuDNN's attention returns: besides the result, the log-sum-exp of its weights."""
    return primitive.name.startswith("dot_product_attention_fwd")


REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "lean": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(*KEPT), _is_fused_attention
    ),
}
