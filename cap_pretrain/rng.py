"""Random keys as a function of (seed, step, purpose), never carried along."""

import zlib

import jax


def key(seed: int, step: int | jax.Array, purpose: str) -> jax.Array:
    """Returns the random key for `purpose` ("init", "train", ...) at `step`.

    The same arguments always give the same key, so a resumed run draws what the interrupted one
    would have drawn. `step` may be traced.
    """
    base = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return jax.random.fold_in(base, step)
