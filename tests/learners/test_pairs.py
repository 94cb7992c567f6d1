"""Contrastive losses on many devices: nothing is sent that need not be, the ring gives the same."""

import math

import jax
import numpy as np
import pytest

from cap_pretrain import learners, partition
from cap_pretrain.errors import UserError
from cap_pretrain.learners import pairs
from tests import layouts
from tests.collectives import collectives, shapes_in
from tests.layouts import SMALL, Training, config, on_eight_devices

BATCH, WIDTH = 48, SMALL["model__width"]


def sent(objective, layout, fields, ring=False):
    """What the compiled step of a config sends, [kind, shapes] each, and the shapes it computes."""
    fields = SMALL | {"model__heads": 4, "model__dropout": 0.0, "batch_size": BATCH} | fields
    c = config(objective, **fields)
    if ring:
        c.learner.ring = True
    program = Training(c, layout).program()
    return collectives(program), sorted(set(shapes_in(program)))


def sizes(found, *kinds):
    """How many numbers there are in each array that a collective of these kinds sends."""
    return [math.prod(shape) for kind, shapes in found for shape in shapes if kind in kinds]


def compared(layout, ring, mask):
    """What `pairs` makes of random vectors on a layout, and the gradient of the loss."""
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
        batch = partition.put_batch({"i": images, "t": texts, "v": valid}, mesh)
        judged = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
        (_, found), gradients = judged(batch["i"], batch["t"], shared, batch["v"])
        alone = jax.jit(loss)(batch["i"], batch["t"], shared, batch["v"])[1]
    return jax.tree.map(np.ndarray.tolist, jax.device_get([found, gradients, alone]))


CALLS = {
    "clip": ("sent", "clip", "data", {}),
    "ring": ("sent", "siglip", "data", {}, True),
    **{
        f"{layout} {mask}": ("compared", layout, True, mask)
        for layout in ("one", "data", "all")
        for mask in (False, True)
    },
}


def call(name, *args):
    return {"sent": sent, "compared": compared}[name](*args)


@pytest.fixture(scope="module")
def eight():
    """What eight devices make of CALLS."""
    return dict(zip(CALLS, on_eight_devices(call, list(CALLS.values())), strict=True))


def test_a_contrastive_step_gathers_texts_and_nothing_larger(eight):
    found, computed = eight["clip"]
    gathered = sizes(found, "all-gather")
    # Forward, the texts; the rest is a number or two for each example: what a softmax and an
    # accuracy over the rows, which are on all devices, need.
    assert gathered.count(BATCH * WIDTH) == 1
    assert all(size <= 2 * BATCH for size in gathered if size != BATCH * WIDTH)
    # Backward, what the texts learn, is summed; all other sums are of parameters and scalars.
    assert sizes(found, "all-reduce", "reduce-scatter").count(BATCH * WIDTH) == 1
    assert not sizes(found, "all-to-all", "collective-permute")
    # A device has the logits of its own images.
    assert [BATCH // 8, BATCH] in computed
    assert [BATCH, BATCH] not in computed


def test_the_ring_gathers_nothing(eight):
    found, computed = eight["ring"]
    assert not sizes(found, "all-gather", "all-to-all")
    onward = sizes(found, "collective-permute")
    assert onward.count(BATCH // 8 * WIDTH) == 2  # texts, and what they learn
    assert max(onward) == BATCH // 8 * WIDTH
    assert BATCH * WIDTH not in sizes(found, "all-reduce", "reduce-scatter")
    assert [BATCH // 8, BATCH] not in computed


@pytest.mark.parametrize("mask", [False, True], ids=["all", "some"])
def test_the_ring_gives_the_same_on_any_layout(eight, mask):
    expected = compared("one", False, mask)
    for layout in ("one", "data", "all"):
        found = eight[f"{layout} {mask}"]
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=layout)


def test_the_ring_is_for_losses_of_single_pairs():
    with pytest.raises(UserError, match="learner.ring: 'softmax' needs all texts"):
        learners.defaults("dual_encoder", contrast="softmax", ring=True)
