"""The text tower against torch; the decoder's cache and initial parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain import learners
from cap_pretrain.learners.captioner import shift_right
from cap_pretrain.models.caches import attend_cached, for_queries, padded
from cap_pretrain.models.layers import Attention, Compute
from cap_pretrain.training import plan
from cap_pretrain.training.step import split_learner
from tests import tiny, torch_reference, toy

# A decoder that differs in size from its encoder, and its number of heads.
NARROW, NARROW_HEADS = dict(decoder_width=12, decoder_mlp=20, decoder_heads=3), 3


@pytest.fixture(scope="module")
def fresh():
    """Initial parameters of a captioner, by path."""
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


def test_a_decoder_of_another_size_is_that_of_torch():
    split, text = tiny.split(tiny.config(**NARROW)), tiny.texts([7, 7, 4, 2])
    parallel = np.array([True, False, True, False])

    def logits(learner, images):
        return learner.predict(learner.encode(images).tokens, text, parallel)

    out = tiny.jitted(split, logits)(tiny.images(4))
    args = (split[1], tiny.images(4), text, parallel, tiny.HEADS, NARROW_HEADS)
    assert out.std() > 0.5
    np.testing.assert_allclose(out, torch_reference.captioner(*args), atol=1e-4)


def test_a_decoder_of_another_size_leaves_the_encoder_as_it_is():
    c = toy.config(model__name="L/14", data__image_size=224, text__length=64)
    c.model.update(dict(decoder_width=768, decoder_depth=12, decoder_mlp=3072, decoder_heads=12))
    counts = plan.count_parameters(tiny.abstract(c, vocab=32_000)[1])
    assert f"{counts['encoder'] / 1e6:.1f}" == "303.2"
    cross = 2 * 768 * 768 + 2 * 1024 * 768  # queries and outputs, keys and values
    layer = 4 * 768 * 768 + cross + 2 * 768 * 3072 + 3 * 768
    assert counts["decoder"] == 12 * layer + 32_001 * 768 + 768 + 769 * 32_000
    assert counts["text_positions"] == 64 * 768


@pytest.mark.parametrize("fields", [{}, NARROW], ids=["of the encoder's size", "of another"])
def test_steps_with_the_cache_give_the_logits_of_the_whole(fields):
    split, text = tiny.split(tiny.config(**fields)), tiny.texts([7, 7, 4, 0])
    encoded = np.random.default_rng(0).standard_normal((4, 16, 16)).astype(np.float32)
    whole = tiny.jitted(split, lambda learner, *args: learner.predict(*args))(encoded, text)
    start = tiny.jitted(split, lambda learner, x: learner.decoder.init_cache(x, tiny.LENGTH))
    step = tiny.jitted(split, lambda learner, *args: learner.decode_step(*args))
    inputs, cache = shift_right(text), start(encoded)
    for position in range(tiny.LENGTH):
        logits, cache = step(inputs[:, position], position, cache)
        np.testing.assert_allclose(logits, whole[:, position], atol=1e-4)


def test_padded_keys_are_not_attended_to():
    compute = Compute(dtype=jnp.bfloat16)
    attention = Attention(16, 2, bias=False, compute=compute, rngs=nnx.Rngs(0))
    encoded = np.random.default_rng(0).standard_normal((3, 13, 16))
    x = jnp.asarray(encoded[:, :4], jnp.bfloat16)
    image = for_queries(*attention.keys_values(jnp.asarray(encoded, jnp.bfloat16)))
    keys, values, mask = more = padded(*image)
    assert keys.shape[-1] == values.shape[-2] == len(mask) == 16
    found, expected = (
        np.asarray(attend_cached(attention, x, *of), np.float32) for of in (more, image)
    )
    np.testing.assert_allclose(found, expected, rtol=2**-6, atol=2**-8)
    single = tuple(part.astype(jnp.float32) for part in image)
    assert padded(*single) == single


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
