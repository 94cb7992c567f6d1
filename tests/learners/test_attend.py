"""`attend` returns the attention weights of the forward pass."""

import jax
import numpy as np
import pytest

from cap_pretrain.errors import UserError
from tests import tiny

IMAGES, TEXT = tiny.images(4), tiny.texts([7, 7, 4, 0])


@pytest.fixture(scope="module")
def cap():
    # The decoder differs in size from the encoder, so that no shapes match by accident.
    fields = dict(decoder_width=12, decoder_mlp=20, decoder_heads=3, attention="xla")
    split = tiny.split(tiny.config(**fields))
    split[1]["decoder"]["blocks"]["cross_attention"]["query"]["kernel"] *= 8
    return split


@pytest.fixture(scope="module")
def computed(cap):
    """Record the cross-attention weights [layers, B, heads, T, N] of the forward pass."""
    found, attend = [], jax.nn.dot_product_attention

    def overhear(query, keys, values, *, mask, implementation):
        if query.shape[1] != keys.shape[1]:  # cross-attention
            jax.debug.callback(lambda *args: found.append(args), query, keys, ordered=True)
        return attend(query, keys, values, mask=mask, implementation=implementation)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.nn, "dot_product_attention", overhear)
        predict = tiny.jitted(cap, lambda learner, *args: learner.predict(*args))
        encode = tiny.jitted(cap, lambda learner, images: learner.encode(images).tokens)
        predict(encode(IMAGES), TEXT)
        jax.effects_barrier()
    logits = np.stack([np.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5 for q, k in found])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attended(cap, **options):
    return tiny.jitted(cap, lambda learner, *args: learner.attend(*args, **options))(IMAGES, TEXT)


def test_attention_is_that_of_the_forward_pass(cap, computed):
    assert computed.shape == (2, 4, 3, 7, 16)
    by_layer = computed.mean(2)
    assert np.abs(by_layer[0] - by_layer[1]).max() > 0.1
    for options, expected in (
        ({}, by_layer[1]),
        ({"layer": 0}, by_layer[0]),
        ({"layer": None}, by_layer.mean(0)),
    ):
        found = attended(cap, **options)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(np.sum(found, -1), 1, atol=1e-6)


def test_attention_is_that_for_the_word_to_come(cap):
    changed = TEXT.copy()
    changed[:, 3] += 1
    attend = tiny.jitted(cap, lambda learner, *args: learner.attend(*args))
    before, after = np.asarray(attend(IMAGES, TEXT)), np.asarray(attend(IMAGES, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])  # computed before it is read
    assert np.abs(before[:, 4] - after[:, 4]).max(-1).min() > 1e-3


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_is_not_there(cap, layer):
    with pytest.raises(UserError, match=f"no layer {layer}; the decoder has layers 0 to 1"):
        attended(cap, layer=layer)
