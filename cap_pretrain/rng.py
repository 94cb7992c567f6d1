"""Random keys as a pure function of (seed, step, purpose), so that no state is carried."""

import zlib

import jax


def key(seed: int, step: int | jax.Array, purpose: str) -> jax.Array:
    """Return the random key for `purpose` at `step`.

    The same arguments always give the same key, so a resumed run draws the same random numbers as
    an uninterrupted one.

    Args:
        seed: the seed of the run.
        step: the training step; it may be traced.
        purpose: what the key is for, such as "init" or "train".
    """
    base = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return jax.random.fold_in(base, step)
