"""The exported `tokenizer.json` gives the ids of the sentencepiece model."""

import io
import random
import string

import pytest
import sentencepiece

from cap_pretrain.convert import fast_tokenizer
from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer, source_captions
from cap_pretrain.errors import UserError
from tests.parity import require

tokenizers = require("tokenizers")

pytestmark = pytest.mark.parity

LENGTH = 24
ODD = [
    *("", "  ", "Hello,  World!\n\tTabs and\u00a0spaces ", "a" * 60, "don't — “quotes” … ½"),
    *("Ünïcödé Straße ﬁne ２０２０", "日本語 🙂🙂 x🙂y", "▁under_score", "e\u0301", "\u200b\x07"),
]


def train(kind, tmp_path, **options):
    captions = source_captions(Scenes("train", 16, length_train=200), 200)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=captions,
        model_writer=model,
        model_type=kind,
        vocab_size=80,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
        **options,
    )
    path = tmp_path / f"{kind}.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_ids_are_those_of_the_training(kind, lower, tokenizer_path, tmp_path):
    path = tokenizer_path if kind == "bpe" else train(kind, tmp_path)
    ours = SentencePieceTokenizer(path, LENGTH, lower)
    files = fast_tokenizer.files(path.read_bytes(), length=LENGTH, lower=lower)
    assert files["tokenizer.model"] == path.read_bytes()
    theirs = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    theirs.enable_truncation(LENGTH)
    theirs.enable_padding(length=LENGTH, pad_id=0, pad_token="<pad>")

    rng = random.Random(0)
    letters = string.ascii_letters + string.punctuation.replace("<", "") + " " * 20 + "äß▁"
    noise = ["".join(rng.choices(letters, k=rng.randint(0, 60))) for _ in range(500)]
    captions = list(source_captions(Scenes("val", 16), 200))
    for text in [*captions, *noise, *ODD]:
        assert theirs.encode(text).ids == ours.encode(text).tolist(), repr(text)
    assert theirs.decode(ours.encode(captions[0]).tolist()) == ours.decode(ours.encode(captions[0]))


def test_special_ids_are_those_of_the_model(tokenizer_path):
    ids = fast_tokenizer.special_ids(tokenizer_path.read_bytes())
    assert ids == {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def test_other_types_of_models_are_refused(tmp_path):
    model = train("char", tmp_path).read_bytes()
    with pytest.raises(UserError, match="only sentencepiece models of type BPE or unigram"):
        fast_tokenizer.files(model, length=LENGTH, lower=True)
