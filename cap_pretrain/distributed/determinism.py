"""The same bits each time on NVIDIA GPUs (`config.deterministic`); CPUs and TPUs give them anyway.

Three things differ between two runs of one program on a GPU: kernels chosen by timing (autotuning),
sums by atomic additions (scatter, some of cuBLAS and cuDNN), and sums inside NVLink switches. The
first two are compiler options, given to the functions that make the training state. XLA makes a
scatter deterministic by doing it element by element, so the losses have none and, with the switch
on, neither have the embeddings.

Sources: openxla.org/xla/determinism; openxla/xla pull requests 12520 (these options), 14125 (cuDNN
attention) and 17886 (scatter); NVIDIA/nccl issue 1497 (NVLS).
"""

import os

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

# For `jax.jit(…, compiler_options=…)`; backends other than NVIDIA's ignore them.
COMPILER_OPTIONS = {
    "xla_gpu_deterministic_ops": True,
    "xla_gpu_exclude_nondeterministic_ops": True,
    "xla_gpu_autotune_level": 0,
}


def compiler_options(on: bool) -> dict[str, bool | int] | None:
    """What `jax.jit` is to be told."""
    return COMPILER_OPTIONS if on else None


def set_environment(config: ConfigDict) -> None:
    """Keeps NCCL from sums in NVLink switches, unless the user chose; before devices are used."""
    if config.deterministic:
        os.environ.setdefault("NCCL_ALGO", "^NVLS")


@jax.custom_vjp
def rows_of(table: jax.Array, index: jax.Array) -> jax.Array:
    """`table[index]`, [V, D] and int [...] -> [..., D], with a matrix product as its gradient."""
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
