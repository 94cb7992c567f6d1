"""Fingerprints change with every bit of an array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.fingerprint import fingerprint, fingerprints

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool", "uint32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4)])
def test_every_flipped_bit_changes_it(dtype, shape):
    rng = np.random.default_rng(0)
    x = np.asarray(jnp.asarray(rng.integers(0, 2, shape), dtype))
    take = jax.jit(fingerprint)
    seen = {int(take(x))}
    raw = np.frombuffer(x.tobytes(), np.uint8)
    for byte in range(len(raw)):
        changed = raw.copy()
        changed[byte] ^= 1
        seen.add(int(take(np.frombuffer(changed.tobytes(), x.dtype).reshape(shape))))
    assert len(seen) == len(raw) + 1


def test_order_changes_it():
    x = jnp.arange(12.0).reshape(3, 4)
    found = {int(fingerprint(v)) for v in (x, x[::-1], x[:, ::-1], x.at[0, :2].set(x[0, 1::-1]))}
    assert len(found) == 4


def test_zero_has_two_signs_and_nan_many_bits():
    zeros = [int(fingerprint(jnp.float32(v))) for v in (0.0, -0.0)]
    assert zeros[0] != zeros[1]
    assert int(fingerprint(jnp.float32(jnp.nan))) == int(fingerprint(jnp.float32(jnp.nan)))


def test_fingerprints_of_a_tree_by_path():
    found = fingerprints({"a": {"b": jnp.ones(3)}, "c": [jnp.zeros(()), None]})
    assert sorted(found) == ["a/b", "c/0"]
    assert int(fingerprint(jnp.zeros((0, 4)))) == 0
