"""CLIP's tokenizer: the ids of transformers, on odd texts, from each kind of file."""

import gzip
import json
import pickle
import time
import tracemalloc

import pytest

from cap_pretrain.data.text import byte_pairs
from cap_pretrain.data.text.byte_pairs import BytePairTokenizer
from cap_pretrain.data.text.tokenizers import encode_answer
from cap_pretrain.errors import UserError
from tests.convert.dual_models import vocabulary, write_clip_tokenizer

ODD = [
    *("a photo of the red!", "!", "!!! wow !!!", "", " ", "'s", "x'sy z'll !'s"),
    "I'm SURE they'll say it's DON'T we've 'sup",
    "emoji 😀👍🏽 family 👨‍👩‍👧 ok",
    "café naïve re\u0301sume\u0301 Ĳ İstanbul ǅ ẞ ΣΑΣ ﬁ ﷺ",
    "&amp; &lt;b&gt; caf&eacute;",
    "数字 一二三 ½ ² Ⅷ 12345 ३४ हिन्दी ภาษา العربية",
    "tabs\t\tnew\nlines\u00a0nbsp\u3000wide \x1c\x1d \x00 zero\u200bwidth \ufeff",
    "“curly” ‘quotes’ – dash… snake_case http://x.y/z?q=1",
    "the quick brown fox " * 20,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    write_clip_tokenizer(path)
    (path / "own").mkdir()
    (path / "own" / "tokenizer.json").write_bytes(byte_pairs.content(vocabulary()))
    return path


@pytest.mark.parity
def test_ids_are_those_of_transformers(folder):
    from tests.parity import require

    theirs = require("transformers").CLIPTokenizer.from_pretrained(folder)
    theirs.save_pretrained(folder / "saved")
    for path in ("merges.txt", "own/tokenizer.json", "saved/tokenizer.json"):
        tokenizer = BytePairTokenizer(folder / path, 40)
        for text in ODD:
            ids = theirs(text, truncation=True, max_length=40)["input_ids"]
            assert [n - 1 for n in tokenizer.encode(text) if n] == ids, text


def test_rows_have_a_start_an_end_and_padding_that_is_no_token(folder):
    tokenizer = pickle.loads(pickle.dumps(BytePairTokenizer(folder / "merges.txt", 8)))
    row = tokenizer.encode("!")
    bang = vocabulary().ids["!</w>"] + 1
    assert row.tolist() == [tokenizer.eos_id - 1, bang, tokenizer.eos_id, 0, 0, 0, 0, 0]
    assert tokenizer.vocab_size == tokenizer.eos_id + 1
    long = BytePairTokenizer(folder / "merges.txt", 5).encode("a b c d e f g")
    assert long[-1] == tokenizer.eos_id and long.all()
    wide = BytePairTokenizer(folder / "merges.txt", 40)
    assert wide.decode(wide.encode("The RED café, 😀!")) == "the red café , 😀!"


def test_without_a_vocabulary_the_order_is_that_of_clip(folder, tmp_path):
    (tmp_path / "bpe.txt").write_bytes((folder / "merges.txt").read_bytes())
    assert byte_pairs.read(tmp_path / "bpe.txt") == vocabulary()


def test_a_long_word_takes_no_time(folder):
    begin = time.process_time()
    BytePairTokenizer(folder / "merges.txt").encode("the" * 30_000)
    assert time.process_time() - begin < 5


def test_memory_is_bounded(folder, tmp_path):
    tokenizer = BytePairTokenizer(folder / "merges.txt")
    tokenizer.encode("the " + "字" * 22)
    assert tokenizer._of_short_word.cache_info().currsize == 1
    bomb = tmp_path / "merges.txt.gz"
    bomb.write_bytes(gzip.compress(b"#version\n" + b"a b\n" * 2**20))
    tracemalloc.start()
    with pytest.raises(UserError, match="has over 524,288 merges"):
        byte_pairs.read(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_question_and_its_answer_have_one_start(folder):
    tokenizer = BytePairTokenizer(folder / "merges.txt", 8)
    start, end = tokenizer.eos_id - 1, tokenizer.eos_id
    a, b = (vocabulary().ids[f"{letter}</w>"] + 1 for letter in "ab")
    for question, answer, limit, row, given in (
        ("a", "b", 0, [start, a, b, end], 2),
        ("a", "b b b", 2, [start, a, b, end], 2),
        ("", "b b b", 2, [start, b, end], 0),
        ("a a a a a a", "b b b b b b", 0, [start, a, a, a, b, b, b, end], 4),
        ("a", None, 2, [start, a], 2),
    ):
        ids, count = encode_answer(tokenizer, question, answer, limit)
        assert (ids[ids != 0].tolist(), count, len(ids)) == (row, given, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"end_of_word_suffix": None}, "is not CLIP's tokenizer"),
        ({"type": "Unigram"}, "is not CLIP's tokenizer"),
        ({"vocab": {"a": 0}}, "it lacks"),
        ({"vocab": {"a": 2**40}}, "must be from 0 to"),
        ({"vocab": {"a": "0"}}, "must be int"),
        ({"merges": [["a"]]}, "has a merge that is not of two tokens"),
        ({"merges": ["q q"]}, "merges 'q q', which has no id"),
        ({"merges": 3}, "'merges' must be list"),
        ({"merges": [0] * 2**19 + [0]}, "has over 524,288 merges"),
        ({"vocab": {"\ud800": 0}}, "has half a surrogate pair"),
        ({"vocab": {"x" * 999: "0"}}, "id of 'x{78}…"),
    ],
)
def test_what_is_not_of_clip_is_refused(change, message, folder, tmp_path):
    content = json.loads((folder / "own" / "tokenizer.json").read_text())
    content["model"] |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert byte_pairs.is_byte_pairs_file(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=message):
        BytePairTokenizer(tmp_path / "tokenizer.json")
