import contextlib
import json
import os
import pickle
import random
import runpy
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from cap_pretrain.data.text.tokenizers import (
    NoText,
    SentencePieceTokenizer,
    encode_answer,
    source_captions,
    train_sentencepiece,
)
from cap_pretrain.data.text.words import is_words_file
from cap_pretrain.errors import UserError
from tests import memory

COLOURS = ("red", "blue", "green", "yellow", "purple")
SHAPES = ("circle", "square", "triangle", "star")
CAPTIONS = [
    f"A {size} {a} {shape} next to a {b} {other}."
    for size in ("big", "small")
    for a in COLOURS
    for b in COLOURS
    for shape in SHAPES
    for other in SHAPES
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return train_sentencepiece(CAPTIONS, tmp_path_factory.mktemp("tokenizer"), vocab_size=60)


def test_encodes_the_models_own_ids_then_eos_then_padding(model_path):
    tokenizer = SentencePieceTokenizer(model_path, max_len=32)
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    pieces = model.encode("a big red star")
    assert len(pieces) > 3
    ids = tokenizer.encode("A big RED star")
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, pieces + [1] + [0] * (31 - len(pieces)))
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.vocab_size == len(model) <= 60


def test_lower_casing_is_an_option(model_path):
    kept = SentencePieceTokenizer(model_path, lower=False)
    assert 2 in kept.encode("RED")  # the model was trained without capital letters
    assert 2 not in kept.encode("red")


def test_a_long_text_is_cut_with_eos_last(model_path):
    whole = SentencePieceTokenizer(model_path, max_len=64).encode(CAPTIONS[7])
    length = int((whole != 0).sum())
    exact = SentencePieceTokenizer(model_path, max_len=length).encode(CAPTIONS[7])
    np.testing.assert_array_equal(exact, whole[:length])
    cut = SentencePieceTokenizer(model_path, max_len=length - 3).encode(CAPTIONS[7])
    np.testing.assert_array_equal(cut[:-1], whole[: length - 4])
    assert cut[-1] == 1


def test_decode_stops_at_eos_or_padding(model_path):
    tokenizer = SentencePieceTokenizer(model_path)
    ids = tokenizer.encode(CAPTIONS[3])
    assert tokenizer.decode(ids) == CAPTIONS[3].lower()
    words = [i for i in ids.tolist() if i > 1]
    assert tokenizer.decode(words + [0] + words) == CAPTIONS[3].lower()
    assert tokenizer.decode([1] + words) == ""
    assert tokenizer.decode(tokenizer.encode("")) == ""


def test_survives_pickling(model_path):
    tokenizer = SentencePieceTokenizer(model_path, max_len=9, lower=False)
    again = pickle.loads(pickle.dumps(tokenizer))
    for text in ("a blue star", "A Blue Star"):
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


def test_training_is_deterministic_and_documented(model_path, tmp_path):
    again = train_sentencepiece(iter(CAPTIONS), tmp_path / "new" / "folder", vocab_size=60)
    assert again.read_bytes() == model_path.read_bytes()
    made = json.loads(again.with_suffix(".json").read_text())
    tokenizer = SentencePieceTokenizer(again)
    assert made["captions"] == len(CAPTIONS)
    assert made["lower"] is True
    assert made["vocab_size"] == tokenizer.vocab_size
    assert sorted(p.name for p in again.parent.iterdir()) == ["tokenizer.json", "tokenizer.model"]


def test_frequent_words_become_pieces_even_if_there_are_few(tmp_path):
    path = train_sentencepiece(CAPTIONS, tmp_path, vocab_size=150)
    tokenizer = SentencePieceTokenizer(path)
    assert (tokenizer.encode("a big red star next to a blue circle.") > 1).sum() <= 10


def test_a_small_corpus_gives_fewer_pieces(tmp_path):
    path = train_sentencepiece(["a red\ncircle", "", "  "], tmp_path, vocab_size=32000)
    tokenizer = SentencePieceTokenizer(path)
    assert 5 < tokenizer.vocab_size < 40
    assert tokenizer.decode(tokenizer.encode("a red circle")) == "a red circle"
    assert json.loads((tmp_path / "tokenizer.json").read_text())["captions"] == 1


@pytest.mark.parametrize(
    ("captions", "vocab_size", "message"),
    [([], 100, "no captions"), (["", "\n"], 100, "no captions"), (CAPTIONS, 10, "vocab_size 10")],
)
def test_captions_that_cannot_be_trained_on(tmp_path, captions, vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_sentencepiece(captions, tmp_path, vocab_size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocab_size", [-1, 0, 2**31, 99999999999])
def test_impossible_sizes_raise(tmp_path, vocab_size):
    with pytest.raises(UserError, match=f"vocab_size is {vocab_size}; it must be from 1 to"):
        train_sentencepiece(CAPTIONS, tmp_path, vocab_size)
    assert not list(tmp_path.iterdir())


def test_captions_and_seeds_of_any_kind_are_trained_on(tmp_path):
    for seed in (-1, 2**40):
        path = train_sentencepiece([*CAPTIONS, "half \ud83d", "a\0b"], tmp_path, 60, seed=seed)
    tokenizer = SentencePieceTokenizer(path, max_len=8)
    marked = train_sentencepiece(["wow!?"] * 9, tmp_path / "without", 60, punctuation=False)
    assert "!" not in SentencePieceTokenizer(marked).decode(
        SentencePieceTokenizer(marked).encode("!")
    )
    assert tokenizer.encode("\ud83d half").tolist() == tokenizer.encode("? half").tolist()
    with pytest.raises(UserError, match="skips those over 4192 bytes"):
        train_sentencepiece(["a" * 5000], tmp_path, 60)
    with pytest.raises(UserError, match="vocab_size 1 is less"):
        train_sentencepiece(CAPTIONS, tmp_path, 1)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        assert not is_words_file(path)
        with pytest.raises(UserError, match="cannot read the file .*not a regular file"):
            SentencePieceTokenizer(path)


@pytest.mark.slow
def test_any_model_file_is_read_or_refused(tmp_path):
    """Damaged models, most of them at the end, where their settings are."""
    whole = train_sentencepiece(CAPTIONS, tmp_path, 60).read_bytes()
    path, rng = tmp_path / "damaged.model", random.Random(0)
    with memory.below(2**20):
        read = 0
        for _ in range(4000):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                start = rng.randrange(rng.choice([0, len(whole) - 500]), len(whole))
                part = rng.choice([b"", rng.randbytes(1), rng.randbytes(3), bytes(data[:9])])
                data[start : start + rng.choice([0, 1, 1, 1, 30])] = part
            path.write_bytes(rng.choice([data, data, data, data[: rng.randrange(len(data))]]))
            with contextlib.suppress(UserError):
                tokenizer = SentencePieceTokenizer(path, max_len=16)
                for text in ("a red star", "naïve ＡＢＣ ① </s>", "\ud800 \0", ""):
                    row = tokenizer.encode(text)
                    assert row.min() >= 0 and row.max() < tokenizer.vocab_size
                    tokenizer.decode(row)
                read += 1
        assert 100 < read < 3900


def test_unusable_model_files_raise(tmp_path):
    with pytest.raises(UserError, match="nowhere.model.*No such file"):
        SentencePieceTokenizer(tmp_path / "nowhere.model")
    with pytest.raises(UserError, match="cannot read"):
        SentencePieceTokenizer(tmp_path)
    junk = tmp_path / "junk.model"
    junk.write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        SentencePieceTokenizer(junk)
    for ids in ({"pad_id": -1, "unk_id": 0, "eos_id": 1}, {"pad_id": 0, "unk_id": 1, "eos_id": -1}):
        other = tmp_path / "other.model"
        with other.open("wb") as writer:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(CAPTIONS),
                model_writer=writer,
                vocab_size=40,
                hard_vocab_limit=False,
                bos_id=-1,
                minloglevel=2,
                **ids,
            )
        with pytest.raises(UserError, match="pad id 0 and an EOS"):
            SentencePieceTokenizer(other)


def test_captions_of_a_source():
    source = [{"captions": [f"{i}a", f"{i}b"]} for i in range(10)] + [{"captions": []}]
    assert list(source_captions(source)) == [f"{i}{c}" for i in range(10) for c in "ab"]
    assert list(source_captions(source, limit=3)) == ["0a", "0b", "3a", "3b", "7a", "7b"]


def test_errors_of_reading_captions_are_raised_unchanged(tmp_path):
    def captions():
        yield from ["a red circle"] * 50
        raise UserError("dataset 'x': example 50 cannot be read")

    with pytest.raises(UserError, match="example 50"):
        train_sentencepiece(captions(), tmp_path, 30)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def train_tokenizer():
    tool = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"
    return runpy.run_path(str(tool))["main"]


def test_the_tool_trains_on_a_dataset(train_tokenizer, tmp_path, capsys):
    arguments = ["--data=scenes", "--limit=200", "--vocab_size=120", f"--out={tmp_path}"]
    assert train_tokenizer(arguments) == 0
    tokenizer = SentencePieceTokenizer(tmp_path / "tokenizer.model")
    assert f"{tokenizer.vocab_size} pieces" in capsys.readouterr().out
    text = "a red circle and a blue square"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tool_reports_errors_briefly(train_tokenizer, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    for arguments, message in [
        (["--data=scnes", f"--out={tmp_path}"], "scnes"),
        (["--data=scenes", "--split=tarin", f"--out={tmp_path}"], "tarin"),
        (["--data=scenes", "--limit=20", "--vocab_size=90", f"--out={file}"], str(file)),
    ]:
        assert train_tokenizer(arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") <= 2


@pytest.mark.skipif("CAP_PRETRAIN_T5" not in os.environ, reason="CAP_PRETRAIN_T5 names no model")
def test_the_t5_vocabulary_gives_its_published_ids():
    tokenizer = SentencePieceTokenizer(os.environ["CAP_PRETRAIN_T5"], max_len=10, lower=False)
    ids = tokenizer.encode("A dog runs across the grass.")
    np.testing.assert_array_equal(ids, [71, 1782, 3154, 640, 8, 5956, 5, 1, 0, 0])
    assert tokenizer.vocab_size == 32000


def test_a_question_comes_before_its_answer_and_is_at_most_half(model_path):
    tokenizer = SentencePieceTokenizer(model_path, max_len=16)
    question, answer = (tokenizer.encode(text) for text in ("a red star", "blue"))
    (q, a) = (int((ids != 0).sum()) for ids in (question, answer))
    ids, given = encode_answer(tokenizer, "a red star", "blue")
    assert given == q - 1 < 8 and ids.dtype == np.int32
    np.testing.assert_array_equal(ids[:given], question[:given])
    np.testing.assert_array_equal(ids[given:], answer[: 16 - given])

    ids, given = encode_answer(tokenizer, "a red star " * 9, "blue")
    assert given == 8 and ids[8 : 8 + a].tolist() == answer[:a].tolist()
    ids, given = encode_answer(tokenizer, "a red star " * 9, "blue circle " * 9)
    assert given == 8 and ids[-1] == tokenizer.eos_id and (ids != 0).all()
    np.testing.assert_array_equal(ids[8:15], tokenizer.encode("blue circle " * 9)[:7])

    ids, given = encode_answer(tokenizer, "", "blue")
    assert given == 0 and ids.tolist() == answer.tolist()
    ids, given = encode_answer(tokenizer, "a red star", None)
    assert given == q - 1 and (ids != 0).sum() == given
    ids, given = encode_answer(NoText(), "a red star", "blue")
    assert given == 0 and ids.shape == (0,)


def test_questions_are_text_too():
    source = [{"captions": ["yes", "no"], "question": "is it?"}, {"captions": ["a dog"]}]
    assert list(source_captions(source)) == ["is it?", "yes", "no", "a dog"]
