"""Sample captions: in order, of the requested images, equal to those of the decoder alone."""

import jax
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.evals.captions import Captions
from cap_pretrain.evals.inference.captioning import Captioning
from cap_pretrain.models.decoding import CaptionSpec, beam_search
from tests.evals import stubs


@pytest.fixture(scope="module")
def captioner(tokenizer_path):
    return stubs.small("captioner", tokenizer_path, text__length=8)


def test_captions_are_greedy_in_order_and_kept_with_their_references(captioner):
    context, variables = captioner
    result = Captions(context, Captions.Options(count=5, shown=2))(variables)
    samples = result.details["samples"]
    source = context.source()
    assert [s["id"] for s in samples] == [source[i]["id"] for i in range(5)]
    assert [s["references"] for s in samples] == [source[i]["captions"] for i in range(5)]
    assert len(result.lines) == 4
    assert samples[1]["caption"] in result.lines[2]
    words = [len(s["caption"].split()) for s in samples]
    np.testing.assert_allclose(result.metrics["mean_words"], np.mean(words))
    distinct = len({s["caption"] for s in samples}) / 5
    np.testing.assert_allclose(result.metrics["distinct_share"], distinct)

    del result.details["samples"]
    protocol = {"protocol": "greedy decoding", "dataset": "scenes", "split": "val", "images": 5}
    assert result.details == protocol

    # Without cache and batches: the whole caption is predicted again for each token.
    learner = nnx.merge(context.graphdef, *variables)
    predict = jax.jit(learner.predict)
    images = np.stack([source[i]["image"] for i in range(5)])
    encoded = learner.encode(images).tokens
    text = np.zeros((5, 8), np.int32)
    for position in range(8):
        text[:, position] = np.argmax(predict(encoded, text)[:, position], -1)
    assert [context.tokenizer.decode(ids) for ids in text] == [s["caption"] for s in samples]


def test_the_decoding_is_an_option(captioner):
    context, variables = captioner
    options = Captions.Options(count=5, method="beam", beams=2, length_norm=0.5)
    result = Captions(context, options)(variables)
    assert result.details["protocol"] == "beam search, 2 beams, log p / tokens ** 0.5"
    learner = nnx.merge(context.graphdef, *variables)
    source = context.source()
    images = np.stack([source[i]["image"] for i in range(5)])
    eos = context.tokenizer.eos_id
    tokens = jax.jit(
        lambda images: beam_search(
            learner.decode_step,
            learner.init_decoding(images, 2),
            CaptionSpec(batch=5, length=8, start=0, eos=eos),
            beams=2,
            length_norm=0.5,
        )
    )(images)
    captions = [context.tokenizer.decode(ids) for ids in np.asarray(tokens)]
    assert captions == [sample["caption"] for sample in result.details["samples"]]


def test_what_is_drawn_depends_on_the_image_and_not_on_the_batch(captioner):
    context, variables = captioner
    how = Captions.Options(method="sample", temperature=2.0)

    def captions(batch_size, limit):
        written = Captioning(context, context.source(), batch_size=batch_size, limit=limit, how=how)
        return dict(written(variables))

    six = captions(6, 6)
    assert len(set(six.values())) == 6
    assert captions(4, 6) == six


def test_learners_that_write_no_captions_are_refused(tokenizer_path):
    context, _ = stubs.small("dual_encoder", tokenizer_path)
    with pytest.raises(UserError, match="which a DualEncoder does not write"):
        Captions(context, Captions.Options())
