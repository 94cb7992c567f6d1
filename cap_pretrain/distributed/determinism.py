"""Bitwise reproducible runs on NVIDIA GPUs (`config.deterministic`); CPUs and TPUs always are.

Two runs of one program on a GPU differ for three reasons: kernels chosen by timing (autotuning),
sums by atomic additions (scatter, parts of cuBLAS and cuDNN), and sums inside NVLink switches.
Compiler options avoid the first two, but XLA then runs a scatter element by element. So the losses
use none, and with `config.deterministic` the embeddings use none either.

Sources: openxla.org/xla/determinism; openxla/xla pull requests 12520 (these options), 14125 (cuDNN
attention) and 17886 (scatter); NVIDIA/nccl issue 1497 (NVLS).
"""

import os

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

# For `jax.jit(…, compiler_options=…)`; backends other than NVIDIA's ignore them.
COMPILER_OPTIONS: dict[str, bool | int] = {
    "xla_gpu_deterministic_ops": True,
    "xla_gpu_exclude_nondeterministic_ops": True,
    "xla_gpu_autotune_level": 0,
}


def compiler_options(deterministic: bool) -> dict[str, bool | int] | None:
    """Return the `compiler_options` argument for `jax.jit`."""
    return COMPILER_OPTIONS if deterministic else None


def set_environment(config: ConfigDict) -> None:
    """Disable NCCL's sums in NVLink switches if `config.deterministic` and `NCCL_ALGO` is not set.

    Call it before devices are used.
    """
    if config.deterministic:
        os.environ.setdefault("NCCL_ALGO", "^NVLS")


@jax.custom_vjp
def rows_of(table: jax.Array, index: jax.Array) -> jax.Array:
    """Return `table[index]`, [V, D] and int [...] -> [..., D]; its gradient needs no scatter."""
    return table[index]


def _forward(table: jax.Array, index: jax.Array):
    return table[index], (index, table)


def _backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array):
    index, table = residuals
    hits = jax.nn.one_hot(index.reshape(-1), len(table), dtype=gradient.dtype)
    gradient = gradient.reshape(-1, gradient.shape[-1])
    summed = jnp.matmul(hits.T, gradient, preferred_element_type=jnp.float32)
    return summed.astype(table.dtype), None


rows_of.defvjp(_forward, _backward)
