"""Random keys as a pure function of (seed, step, purpose), so that no state is carried."""

import zlib

import jax


def key(seed: int, step: int | jax.Array, purpose: str) -> jax.Array:
    """Return the random key for `purpose` ("init", "train", …) at `step`, which may be traced.

    It depends on nothing else, so a resumed run draws the numbers of an uninterrupted one.
    """
    base = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return jax.random.fold_in(base, step)


def derived(key: jax.Array, purpose: str) -> jax.Array:
    """Return a further key for `purpose`, other than those that splitting `key` makes."""
    return jax.random.fold_in(key, zlib.crc32(purpose.encode()))
