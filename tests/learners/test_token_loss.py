"""The cross-entropy of tokens and its gradient, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cap_pretrain.learners import token_losses
from cap_pretrain.learners.token_losses import is_first_maximum, token_loss

LOGITS = 3 * jax.random.normal(jax.random.key(0), (4, 5, 7))
LABELS = jax.random.randint(jax.random.key(1), (4, 5), 0, 7)


@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient(smoothing, dtype, where, monkeypatch):
    monkeypatch.setattr(token_losses, "platform", lambda: where)
    weights = jax.random.uniform(jax.random.key(2), LABELS.shape)

    def plain(logits):
        targets = optax.smooth_labels(jax.nn.one_hot(LABELS, 7), smoothing)
        return jnp.sum(weights * optax.softmax_cross_entropy(logits, targets))

    def ours(logits):
        return jnp.sum(weights * token_loss(logits, LABELS, smoothing, dtype))

    logits = LOGITS.astype(dtype).astype(jnp.float32)  # as a model computes them
    got, expected = (jax.jit(jax.value_and_grad(f))(logits) for f in (ours, plain))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-6)


def test_the_first_maximum_counts_as_the_prediction():
    logits = jnp.round(LOGITS / 3)  # with many equal values
    got = jax.jit(is_first_maximum)(logits, LABELS)
    np.testing.assert_array_equal(got, jnp.argmax(logits, -1) == LABELS)
    ties = jnp.zeros((7, 7))  # as at the start of training
    np.testing.assert_array_equal(is_first_maximum(ties, jnp.arange(7)), np.arange(7) == 0)
