"""A 32-bit fingerprint of an array's bits: another if any element changes, the same on any layout.

It is computed where the array lies, so that checking gigabytes moves four bytes. Checkpoints use it
to notice damage, the loop to log which examples it has seen. It is no cryptographic hash.
"""

from typing import Any

import jax
import jax.numpy as jnp

from cap_pretrain import rules

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def _mix(h: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (Appleby 2011), a bijection of 32-bit words."""
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def fingerprint(x: jax.Array) -> jax.Array:
    """Returns a uint32 scalar made of the bits of `x`, an array of any shape and dtype.

    Every word is mixed with its position, and the results are added up modulo 2^32: a sum of
    integers does not depend on the order, so neither on how `x` is split over devices. A change of
    one word always shows, since mixing is a bijection; others escape with a chance of 2^-32.
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
    """Returns the fingerprint of every leaf by its path."""
    return {path: fingerprint(leaf) for path, leaf in rules.flatten(tree).items()}
