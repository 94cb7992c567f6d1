"""Fixtures of the tests of the input pipeline."""

import pytest

from cap_pretrain.data.pipeline import ImageOptions, train_dataset
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer, train_sentencepiece
from tests.data.numbers import SIZE, Numbers


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A sentencepiece model for the captions of `Numbers`."""
    texts = [f"{i} {c}" for i in range(256) for c in "abc"]
    model = train_sentencepiece(texts, tmp_path_factory.mktemp("tokenizer"), vocab_size=40)
    return SentencePieceTokenizer(model, max_len=8)


@pytest.fixture
def build(tokenizer):
    """Return a function that makes a training dataset, by default of two members, augmented."""

    def build(sources=None, crop="random", flip=True, **options):
        if sources is None:
            sources = [(Numbers(30, files=True), 1.0), (Numbers(11, 100, files=True), 3.0)]
        image = ImageOptions(SIZE, crop=crop, flip=flip)
        return train_dataset(sources, tokenizer, image, **{"batch_size": 8, "seed": 1} | options)

    return build
