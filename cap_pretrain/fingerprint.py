"""A 32-bit fingerprint of an array's bits that does not depend on its sharding.

It is computed on the devices that hold the array, so that checking gigabytes transfers four bytes.
Checkpoints use it to detect corruption, and the training loop to log which examples it has seen. It
is not a cryptographic hash.
"""

from typing import Any

import jax
import jax.numpy as jnp

from cap_pretrain import rules

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _mix(h: jax.Array) -> jax.Array:
    """Apply the finalizer of MurmurHash3 (Appleby 2011), a bijection of 32-bit words."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


@jax.jit  # so that a program of many fingerprints traces it once for each shape
def fingerprint(x: jax.Array) -> jax.Array:
    """Return the fingerprint of an array of any shape and dtype, a uint32 scalar.

    Every word is mixed with its position and the results are added modulo 2^32, in any order, so
    the sharding of `x` does not matter. A change of one word always changes the fingerprint,
    because mixing is a bijection; other changes escape with probability 2^-32.
    """
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.uint32(0)
    for axis, size in enumerate(words.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * jnp.uint32(size % 2**32) + index
    # 2^32 / golden ratio, so that position 0 is mixed too.
    return jnp.sum(_mix(words + _mix(position + jnp.uint32(0x9E3779B9))), dtype=jnp.uint32)


def fingerprints(tree: Any) -> dict[str, jax.Array]:
    """Return the fingerprint of every leaf of a tree, uint32 scalars by path."""
    return {path: fingerprint(leaf) for path, leaf in rules.flatten(tree).items()}
