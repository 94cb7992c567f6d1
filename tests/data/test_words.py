"""Word vocabularies and their file; NLTK tokenization on examples checked by hand."""

import contextlib
import pickle
import random
import runpy
from pathlib import Path

import numpy as np
import pytest

from cap_pretrain.data.text.words import (
    Rules,
    WordTokenizer,
    is_words_file,
    nltk_words,
    write_words,
)
from cap_pretrain.errors import UserError

CAPTIONS = [
    "A man's dog runs.",
    "A dog runs on the grass, and a cat looks.",
    "The DOG is 2 years old; the cat isn't.",
]


def make(folder, captions=CAPTIONS, max_len=12, lower=True, **rules):
    return WordTokenizer(write_words(captions, folder, Rules(**rules), lower), max_len)


def test_the_file_says_what_it_holds(tmp_path):
    path = write_words(CAPTIONS, tmp_path, Rules(min_count=2))
    assert path.read_text().split("\n") == [
        "# cap_pretrain words",
        "# captions: 3",
        "# lower: true",
        '# tokenization: "simple"',
        "# min_count: 2",
        "# drop_punctuation: false",
        "# drop_letters: false",
        "<pad>\t0",
        "<end>\t3",
        "<unk>\t10",
        "a\t3",
        "dog\t3",
        "the\t3",
        "cat\t2",
        "runs\t2",
        "",
    ]
    assert is_words_file(path)
    # The file depends neither on the order of captions nor on that of their words.
    again = write_words(reversed(CAPTIONS), tmp_path / "again", Rules(min_count=2))
    assert again.read_bytes() == path.read_bytes()


def test_encodes_words_then_the_end_then_padding(tmp_path):
    tokenizer = make(tmp_path, min_count=2)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 8)
    ids = tokenizer.encode("The cat sees a DOG!")
    assert ids.dtype == np.int32
    assert ids.tolist() == [5, 6, 2, 3, 4, 1, 0, 0, 0, 0, 0, 0]
    assert tokenizer.decode(ids) == "the cat <unk> a dog"
    assert tokenizer.decode([5, 6, 0, 4]) == tokenizer.decode([5, 6, 1, 4]) == "the cat"
    assert tokenizer.encode("").tolist() == [1] + 11 * [0] and tokenizer.decode([1]) == ""


def test_a_long_text_is_cut_and_still_ends(tmp_path):
    tokenizer = make(tmp_path, max_len=4)
    assert tokenizer.decode(tokenizer.encode(CAPTIONS[1])) == "a dog runs"
    assert tokenizer.encode(CAPTIONS[1])[-1] == 1


def test_reopens_and_pickles_as_it_was(tmp_path):
    tokenizer = make(tmp_path, tokenization="nltk", drop_letters=True)
    again = pickle.loads(pickle.dumps(tokenizer))
    for text in (*CAPTIONS, "unknown words aren't known"):
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    assert again.vocab_size == tokenizer.vocab_size


def test_filters_and_casing():
    text = "A man's 3 t-shirts -- 'red' & blue (2)."
    assert Rules().words(text) == ["A", "mans", "3", "tshirts", "red", "blue", "2"]
    assert Rules(drop_letters=True).words(text) == ["mans", "tshirts", "red", "blue"]
    kept = Rules("nltk", drop_punctuation=True).words(text)
    assert kept == ["A", "man", "'s", "3", "t-shirts", "'red", "blue", "2"]


def test_casing_is_the_files(tmp_path):
    kept = make(tmp_path, lower=False)
    assert 2 in kept.encode("the dog IS") and 2 not in kept.encode("The DOG is")


def test_simple_words_know_the_punctuation_of_unicode():
    assert Rules().words("a “tall” man’s — really…") == ["a", "tall", "mans", "really"]


# Expected output of nltk.word_tokenize by the rules in its documentation.
NLTK = [
    ("a man rides a horse.", "a man rides a horse ."),
    ("two dogs, one brown; one white", "two dogs , one brown ; one white"),
    ("a dog runs. a cat sleeps.", "a dog runs . a cat sleeps ."),
    ("the man's dogs' ball", "the man 's dogs ' ball"),
    ("he doesn't, can't and won't.", "he does n't , ca n't and wo n't ."),
    (
        "they're sure we've seen it'll do; i'm he'd",
        "they 're sure we 've seen it 'll do ; i 'm he 'd",
    ),
    ("she cannot, they're gonna wanna", "she can not , they 're gon na wan na"),
    ('a sign reads "stop" here', "a sign reads `` stop '' here"),
    ('("stop")', "( `` stop '' )"),
    ("a sign says 'stop' here", "a sign says 'stop ' here"),
    ("a t-shirt and/or a well-worn hat", "a t-shirt and/or a well-worn hat"),
    ("at 10:30 they paid $1,000 or 3.5%", "at 10:30 they paid $ 1,000 or 3.5 %"),
    ("a black&white photo @ #1", "a black & white photo @ # 1"),
    ("waiting... what?!", "waiting ... what ? !"),
    ("a red -- or blue -- car", "a red -- or blue -- car"),
    ("a u.s. flag by mr. smith", "a u.s. flag by mr. smith"),
    ("a flag of the u.s.", "a flag of the u.s ."),
    ("(a dog.) a cat", "( a dog . ) a cat"),
    ("it is 5 o'clock rock'n'roll", "it is 5 o'clock rock'n'roll"),
    ("a man’s hat", "a man ’ s hat"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "words"), NLTK)
def test_splits_as_nltk_does(text, words):
    assert nltk_words(text) == words.split()


@pytest.mark.parametrize(
    ("captions", "rules", "message"),
    [
        ([], {}, "no captions"),
        (["", " . "], {}, "no captions"),
        (CAPTIONS, {"min_count": 9}, "min_count: none of 15 words occurs 9 times in 3 captions"),
    ],
)
def test_captions_that_give_no_vocabulary_raise(tmp_path, captions, rules, message):
    with pytest.raises(UserError, match=message):
        write_words(captions, tmp_path, Rules(**rules))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rules", "message"),
    [({"tokenization": "nltkk"}, "tokenization.*'nltk'"), ({"min_count": 0}, "min_count: 0")],
)
def test_invalid_rules_raise(rules, message):
    with pytest.raises(UserError, match=message):
        Rules(**rules)


def test_unusable_files_raise(tmp_path):
    path = write_words(CAPTIONS, tmp_path, Rules())
    whole = path.read_text()
    assert not is_words_file(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere.*No such file"):
        WordTokenizer(tmp_path / "nowhere")
    for damaged in (whole[:-3], whole[:20], "", whole.replace("<unk>", "unk"), whole[30:]):
        path.write_text(damaged)
        with pytest.raises(UserError, match="is not a (complete )?file of words"):
            WordTokenizer(path)
    path.write_text(whole.replace("\t", " "))
    with pytest.raises(UserError, match="is not a file of words"):
        WordTokenizer(path)


MADE_BY_HAND = {
    "not a number": ("# min_count: 1", '# min_count: "a"', "'min_count' must be int, found 'a'"),
    "not a choice": ("# lower: true", "# lower: []", "'lower' must be bool, found a list"),
    "nested": ("# lower: true", "# lower: " + "[" * 10**5, "nested too deeply"),
    "without a rule": ("# min_count: 1\n", "", "'min_count' is missing"),
    "saved by an editor": ("# cap_pretrain", "\ufeff# cap_pretrain", "its first line is not"),
    "a word twice": ("<unk>\t", "<unk>\t0\ntwice\t1\ntwice\t", "is not a complete file of words"),
    "too large": ("<unk>\t", "a" * 2**26, "has over 67108864 bytes"),
}


@pytest.mark.parametrize("case", MADE_BY_HAND)
def test_files_made_by_hand_raise(case, tmp_path):
    old, new, message = MADE_BY_HAND[case]
    path = write_words(CAPTIONS, tmp_path, Rules())
    whole = path.read_text()
    assert old in whole
    path.write_text(whole.replace(old, new, 1))
    assert is_words_file(path)
    with pytest.raises(UserError, match=message):
        WordTokenizer(path)


@pytest.mark.slow
def test_any_file_of_words_is_read_or_refused(tmp_path):
    """Damaged at random: each is as before at most in its words and casing, or is refused."""
    whole = write_words(CAPTIONS, tmp_path, Rules()).read_bytes()
    path, rng, read = tmp_path / "damaged.tsv", random.Random(0), 0
    for _ in range(2000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(data))
            part = rng.choice(
                [b"", b"\n", b"\t", b"\xff", b'"a"', b"[", b"# ", data[:start], b"-1"]
            )
            data[start : start + rng.choice([0, 1, 9])] = part
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            tokenizer = WordTokenizer(path, 8)
            row = tokenizer.encode("a red star <unk> \ud800")
            assert row.min() >= 0 and row.max() < tokenizer.vocab_size
            tokenizer.decode(row)
            read += 1
    assert 0 < read < 2000


def test_half_an_emoji_is_counted_as_a_word(tmp_path):
    path = write_words(["a star \ud83d"], tmp_path, Rules(tokenization="nltk"))
    assert WordTokenizer(path).vocab_size == 6


def test_the_tool_counts_the_words_of_a_dataset(tmp_path, capsys):
    tool = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"
    make_tokenizer = runpy.run_path(str(tool))["main"]
    arguments = ["--data=scenes", "--limit=40", "--kind=words", f"--out={tmp_path}"]
    assert make_tokenizer([*arguments, "--min_count=3", "--drop_letters"]) == 0
    tokenizer = WordTokenizer(tmp_path / "words.tsv")
    assert f"words.tsv: {tokenizer.vocab_size} words" in capsys.readouterr().out
    assert "# captions: 200\n" in (tmp_path / "words.tsv").read_text()
    text = "a red circle and a green square"
    assert tokenizer.decode(tokenizer.encode(text)) == "red circle and green square"
    assert make_tokenizer([*arguments, "--tokenization=nltkk"]) == 2
    assert "Did you mean 'nltk'" in capsys.readouterr().err
