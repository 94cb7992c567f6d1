"""Sample captions: in order, of the images asked for, as the decoder alone would write them."""

import jax
import numpy as np

from cap_pretrain.evals.captions import Captions
from tests import toy
from tests.evals.test_loss import context_of


def test_captions_are_greedy_in_order_and_kept_with_their_references(tokenizer_path):
    c = toy.config(model__depth=1, data__scenes__length_val=13, text__length=8)
    context, variables = context_of(c, tokenizer_path)
    result = Captions(context, Captions.Options(count=5, shown=2))(variables)
    samples = result.details["samples"]
    source = context.source()
    assert [s["id"] for s in samples] == [source[i]["id"] for i in range(5)]
    assert [s["references"] for s in samples] == [source[i]["captions"] for i in range(5)]
    assert len(result.lines) == 4
    assert samples[1]["caption"] in result.lines[2]
    words = [len(s["caption"].split()) for s in samples]
    np.testing.assert_allclose(result.figures["mean_words"], np.mean(words))
    distinct = len({s["caption"] for s in samples}) / 5
    np.testing.assert_allclose(result.figures["distinct_share"], distinct)

    # Without cache and batches: the whole caption is predicted anew for each token.
    from flax import nnx

    learner = nnx.merge(context.graphdef, *variables)
    predict = jax.jit(lambda encoded, text: learner.predict(encoded, text))
    images = np.stack([source[i]["image"] for i in range(5)])
    encoded = learner.encode(images).tokens
    text = np.zeros((5, 8), np.int32)
    for position in range(8):
        text[:, position] = np.argmax(predict(encoded, text)[:, position], -1)
    assert [context.tokenizer.decode(ids) for ids in text] == [s["caption"] for s in samples]
