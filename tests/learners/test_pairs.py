"""Contrastive losses on many devices: minimal communication, and the ring gives equal results."""

import jax
import numpy as np
import pytest

from cap_pretrain import learners
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.learners import pairs
from tests import layouts
from tests.collectives import Sent, collectives, of_step
from tests.layouts import SMALL, on_eight_devices

BATCH, WIDTH = 48, SMALL["model__width"]


def compared(layout, ring, mask):
    """Return the comparison of random vectors on a layout, its gradients, and its collectives."""
    mesh = layouts.mesh(layout)
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((2, 16, 5)).astype(np.float32)
    texts[:12] += images[:12]
    valid = np.arange(16) % 5 != 1 if mask else np.ones(16, bool)
    shared = {"scale": np.float32(0.5), "bias": np.float32(-0.3)}

    def loss(images, texts, shared, valid):
        fn = pairs.around if ring else pairs.gathered
        found = fn(pairs.sigmoid_loss, images, texts, shared, valid)
        return 3 * found.loss, found

    with jax.set_mesh(mesh):
        batch = sharding.put_batch({"i": images, "t": texts, "v": valid}, mesh)
        args = batch["i"], batch["t"], shared, batch["v"]
        learn = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)).lower(*args).compile()
        (_, found), gradients = learn(*args)
        alone = jax.jit(loss)(*args)[1]
    found = jax.tree.map(np.ndarray.tolist, jax.device_get([found, gradients, alone]))
    return *found, collectives(learn.as_text())


CALLS = {
    "clip": ("of_step", "clip", "data", {"batch_size": BATCH}),
    **{
        f"{layout} {mask}": ("compared", layout, True, mask)
        for layout in ("one", "data", "all")
        for mask in (False, True)
    },
}


def call(name, *args):
    return {"of_step": of_step, "compared": compared}[name](*args)


@pytest.fixture(scope="module")
def eight():
    """Results of CALLS on eight devices."""
    return dict(zip(CALLS, on_eight_devices(call, list(CALLS.values())), strict=True))


def test_a_contrastive_step_gathers_texts_and_nothing_larger(eight):
    step = Sent(*eight["clip"])
    gathered = step.sizes("all-gather")
    # The forward pass gathers the texts. The rest is one or two numbers per example, which softmax
    # and accuracy need over rows that are on all devices.
    assert gathered.count(BATCH * WIDTH) == 1
    assert all(size <= 2 * BATCH for size in gathered if size != BATCH * WIDTH)
    # The backward pass sums text gradients; all other sums are of parameters and scalars.
    assert step.sizes("all-reduce", "reduce-scatter").count(BATCH * WIDTH) == 1
    assert not step.sizes("all-to-all", "collective-permute")
    # A device holds the logits of its own images.
    assert [BATCH // 8, BATCH] in step.computed
    assert [BATCH, BATCH] not in step.computed


@pytest.mark.slow
def test_the_ring_gathers_nothing():
    fields = {"batch_size": BATCH, "learner__ring": True}
    ring = Sent(*on_eight_devices(of_step, [("siglip", "data", fields)])[0])
    assert not ring.sizes("all-gather", "all-to-all")
    onward = ring.sizes("collective-permute")
    assert onward.count(BATCH // 8 * WIDTH) == 2  # texts and their gradients
    assert max(onward) == BATCH // 8 * WIDTH
    assert BATCH * WIDTH not in ring.sizes("all-reduce", "reduce-scatter")
    assert [BATCH // 8, BATCH] not in ring.computed


@pytest.mark.parametrize("mask", [False, True], ids=["all", "some"])
def test_the_ring_gives_the_same_on_any_layout(eight, mask):
    *expected, _ = compared("one", False, mask)
    for layout in ("one", "data", "all"):
        *found, sent = eight[f"{layout} {mask}"]
        assert {kind for kind, _ in sent} <= {"collective-permute", "all-reduce"}
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=layout)


def test_the_ring_is_for_losses_of_single_pairs():
    with pytest.raises(UserError, match="learner.ring: contrast='softmax' needs all texts"):
        learners.defaults("dual_encoder", contrast="softmax", ring=True)
