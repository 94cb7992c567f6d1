"""What is automatic changes how a step is computed, not what it computes: the same loss curve.

Twenty steps in float32 of every objective, by each choice that "auto" and 0 may become on GPUs
and TPUs, and with the gradients of automatic differentiation in place of explicit ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.learners import token_losses
from cap_pretrain.models import elementwise, mlp
from cap_pretrain.training.step import make_train_step
from tests import tiny, toy

STEPS, BATCH, VOCAB = 20, 8, 23
OBJECTIVES = {
    "cap": ("captioner", {}),
    "cappa": ("captioner", {"parallel_fraction": 0.75, "label_smoothing": 0.1}),
    "clip": ("dual_encoder", {"contrast": "softmax"}),
    "siglip": ("dual_encoder", {"contrast": "sigmoid"}),
}
CHOICES = {
    "gpu": {"remat": "none", "unroll": 9},
    "gpu, some memory": {"remat": "lean", "unroll": 9},
    "gpu, little memory": {"remat": "full", "unroll": 1},
    "tpu": {"remat": "lean", "unroll": 9, "attention": "keep"},
}


def curve(objective, **fields):
    """The losses of twenty steps from the same parameters over the same four batches."""
    learner, options = OBJECTIVES[objective]
    config = tiny.config(learner, options, **fields)
    config.batch_size, config.total_steps = BATCH, STEPS
    init, _, graphdef, tx, rate, mesh = toy.prepared(config, VOCAB)
    with jax.set_mesh(mesh):
        state = init()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        step = make_train_step(graphdef, tx, rate, config, shardings)
        rng, losses = np.random.default_rng(0), []
        batches = [
            {
                "image": tiny.images(BATCH, seed=seed),
                "text": tiny.texts(list(rng.integers(1, tiny.LENGTH + 1, BATCH)), seed),
            }
            for seed in range(4)
        ]
        for n in range(STEPS):
            state, metrics = step(state, batches[n % 4])
            losses.append(metrics["loss"])
    return np.asarray(jax.device_get(losses))


@pytest.fixture(scope="module")
def plain():
    """The curve of each objective with one layer after the other, by automatic differentiation."""

    def cross_entropy(smoothing, dtype, logits, labels):
        del dtype
        nll = -jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(nll, labels[..., None], axis=-1)[..., 0]
        return (1 - smoothing) * own + smoothing * jnp.mean(nll, axis=-1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elementwise.LayerNorm, "__call__", nnx.LayerNorm.__call__)
        patch.setitem(mlp.ACTIVATIONS, "gelu_tanh", jax.nn.gelu)
        patch.setattr(token_losses, "_cross_entropy", cross_entropy)
        fields = {"remat": "none", "unroll": 1, "attention": "xla"}
        return {objective: curve(objective, **fields) for objective in OBJECTIVES}


# What Cap's decoder does, CapPa's does too, and the towers of SigLIP are those of CLIP; so of these
# two, one choice each, for the losses.
CASES = [(objective, choice) for objective in ("cappa", "clip") for choice in CHOICES]
CASES += [("cap", "gpu"), ("siglip", "tpu")]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "choice"), CASES)
def test_the_loss_curve_stays(plain, objective, choice):
    found = curve(objective, **CHOICES[choice])
    assert plain[objective][-1] < plain[objective][0]  # it learns, so gradients matter
    np.testing.assert_allclose(found, plain[objective], rtol=2e-4)
