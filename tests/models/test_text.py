"""The text tower against torch; the decoder's cache and its initial parameters."""

import jax
import numpy as np
import pytest

from cap_pretrain import learners
from cap_pretrain.learners.captioner import shift_right
from cap_pretrain.step import split_learner
from tests import tiny, torch_reference


@pytest.fixture(scope="module")
def fresh():
    """Parameters of a captioner as initialised, by path."""
    c = tiny.config(width=32)
    params = jax.jit(lambda: split_learner(learners.build(c, 500, jax.random.key(1)))[1])()
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in flat}


def test_text_tower_is_that_of_torch():
    split, text = tiny.split(tiny.config("dual_encoder")), tiny.texts([7, 3, 0])
    out = tiny.jitted(split, lambda learner, text: learner.text_tower(text))(text)
    expected = torch_reference.text_tower(split[1]["text_tower"], text, tiny.HEADS)
    assert out.shape == (3, 16)
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_steps_with_the_cache_give_the_logits_of_the_whole():
    split, text = tiny.split(tiny.config()), tiny.texts([7, 7, 4, 0])
    encoded = np.random.default_rng(0).standard_normal((4, 16, 16)).astype(np.float32)
    whole = tiny.jitted(split, lambda learner, *args: learner.predict(*args))(encoded, text)
    start = tiny.jitted(split, lambda learner, x: learner.decoder.init_cache(x, tiny.LENGTH))
    step = tiny.jitted(split, lambda learner, *args: learner.decode_step(*args))
    inputs, cache = shift_right(text), start(encoded)
    for position in range(tiny.LENGTH):
        logits, cache = step(inputs[:, position], position, cache)
        np.testing.assert_allclose(logits, whole[:, position], atol=1e-4)


def test_logits_layer_starts_at_zero(fresh):
    assert not fresh["decoder/logits/kernel"].any()
    assert not fresh["decoder/logits/bias"].any()


def test_decoder_has_no_bias_but_that_of_the_logits(fresh):
    biases = [p for p in fresh if p.startswith("decoder/") and p.endswith("/bias")]
    assert biases == ["decoder/logits/bias"]


def test_encoder_has_biases(fresh):
    layers = ("norm1", "attention/query", "attention/out", "norm2", "mlp/up", "mlp/down")
    assert all(f"encoder/blocks/{layer}/bias" in fresh for layer in layers)


def test_embedding_has_a_row_for_the_mask_token_and_deviation_one(fresh):
    embedding = fresh["decoder/embedding/embedding"]
    assert embedding.shape == (501, 32)
    assert abs(embedding.std() - 1) < 0.03 and abs(embedding.mean()) < 0.03
    assert embedding[500].std() > 0.5


def test_positions_have_deviation_one_over_the_root_of_the_width(fresh):
    assert fresh["text_positions"].shape == (tiny.LENGTH, 32)
    for path in ("text_positions", "encoder/positions"):
        assert abs(fresh[path].std() * 32**0.5 - 1) < 0.2


def test_kernels_are_xavier_uniform_and_layers_differ(fresh):
    for path in ("encoder/blocks/mlp/up/kernel", "decoder/blocks/cross_attention/key/kernel"):
        kernel = fresh[path]
        limit = (6 / sum(kernel.shape[1:])) ** 0.5
        assert 0.95 * limit < np.abs(kernel).max() <= limit
        assert np.abs(kernel[0] - kernel[1]).max() > limit / 2
