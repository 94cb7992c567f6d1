"""Perplexity counts every token of every caption once, whatever the batch size."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.errors import UserError
from cap_pretrain.evals.perplexity import Perplexity
from tests.evals import stubs


class Pictures:
    """Images with no, one or several captions; one cannot be decoded."""

    class_names = []

    def __init__(self, scenes, counts=(5, 1, 3, 0, 2, 4, 5), broken=5):
        self._scenes, self._counts, self._broken = scenes, counts, broken

    def __str__(self):
        return "dataset pictures"

    def __len__(self):
        return len(self._counts)

    def __getitem__(self, index):
        example = dict(self._scenes[index])
        example["captions"] = example["captions"][: self._counts[index]]
        if index == self._broken:
            example["image"] = b"no image"
        return example


@pytest.fixture(scope="module")
def captioner(tokenizer_path):
    return stubs.small("captioner", tokenizer_path, text__length=24)


@pytest.fixture
def measured(captioner, monkeypatch):
    context, variables = captioner
    pictures = Pictures(context.source())
    monkeypatch.setattr(type(context), "source", lambda *_: pictures)

    def measured(**options):
        return Perplexity(context, Perplexity.Options(**options))(variables)

    return measured, pictures


def by_hand(captioner, examples):
    """Return nats, tokens and text of each caption, computed one at a time."""
    context, variables = captioner
    learner = nnx.merge(context.graphdef, *variables)
    predict = jax.jit(
        lambda image, text: jax.nn.log_softmax(learner.predict(learner.encode(image).tokens, text))
    )
    found = []
    for example in examples:
        for caption in example["captions"]:
            ids = context.tokenizer.encode(caption)
            tokens = int((ids != 0).sum())
            log_probs = np.asarray(predict(example["image"][None], ids[None]))[0]
            nats = -sum(float(log_probs[n, ids[n]]) for n in range(tokens))
            found.append((nats, tokens, context.tokenizer.decode(ids)))
    return found


def test_every_caption_counts_by_its_tokens(captioner, measured):
    run, pictures = measured
    result = run(batch_size=3, pairs=6)
    captions = by_hand(captioner, [pictures[i] for i in (0, 1, 2, 4, 6)])
    nats, tokens, texts = zip(*captions, strict=True)
    bits, characters = sum(nats) / math.log(2), len("".join(texts))
    metrics = {
        "perplexity": math.exp(sum(nats) / sum(tokens)),
        "bits_per_token": bits / sum(tokens),
        "bits_per_byte": bits / characters,
        "bits_per_character": bits / characters,
    }
    assert result.metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(result.metrics[name], value, rtol=1e-5)
    counts = {"images": 5, "captions": 16, "tokens": sum(tokens), "characters": characters}
    counts |= {"dataset": "scenes", "split": "val"}
    assert counts.items() <= result.details.items()
    assert result.details["captions_of_full_length"] == tokens.count(24)


def test_batches_do_not_matter(measured):
    run, _ = measured
    few, many = run(batch_size=2, pairs=2), run(batch_size=7)
    assert few.details == many.details
    for name, value in few.metrics.items():
        np.testing.assert_allclose(value, many.metrics[name], rtol=1e-6, err_msg=name)


def test_limit_takes_the_first_images(captioner, measured):
    run, pictures = measured
    result = run(batch_size=2, limit=1)
    captions = by_hand(captioner, [pictures[0]])
    assert result.details["captions"] == 5
    np.testing.assert_allclose(
        result.metrics["perplexity"],
        math.exp(sum(c[0] for c in captions) / sum(c[1] for c in captions)),
        rtol=1e-5,
    )


def test_bytes_are_those_of_utf8(captioner):
    context, _ = captioner
    evaluator = Perplexity(context, Perplexity.Options())
    result = evaluator._result(np.array([math.log(2) * 6]), np.array([3]), ["žába"], 1, 0)
    assert result.metrics["bits_per_byte"] == pytest.approx(1.0)
    assert result.metrics["bits_per_character"] == pytest.approx(1.5)
    assert result.metrics["perplexity"] == pytest.approx(4.0)


def test_what_has_no_perplexity_is_refused(captioner, tokenizer_path, monkeypatch):
    context, _ = stubs.small("dual_encoder", tokenizer_path)
    with pytest.raises(UserError, match="perplexity needs a captioner"):
        Perplexity(context, Perplexity.Options())
    context, _ = captioner
    source = Pictures(context.source(), counts=(0, 0))
    monkeypatch.setattr(type(context), "source", lambda *_: source)
    with pytest.raises(UserError, match="needs captions, and dataset pictures has none"):
        Perplexity(context, Perplexity.Options())
