"""The tokens of words, and their attention maps over the image."""

import numpy as np
import pytest

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.text import words
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer
from cap_pretrain.errors import UserError
from cap_pretrain.evals.inference import word_maps
from cap_pretrain.evals.inference.word_maps import Word, on_grid, words_of
from cap_pretrain.learners.captioner import Captioner
from cap_pretrain.learners.dual_encoder import DualEncoder

CAPTIONS = [caption for i in range(20) for caption in Scenes("val", 16)[i]["captions"]]


class Pieces:
    """Token k + 2 is piece k; a text is its pieces joined, stripped of spaces at the ends."""

    pad_id, eos_id = 0, 1

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids):
        return "".join(self.pieces[i - 2] for i in ids).strip()


def test_pieces_are_joined_to_words():
    tokenizer = Pieces(" a", " ", "tur", "quoise", ",", " man's", " box-", "car", " -")
    text, found = words_of(tokenizer, [2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 0, 0])
    assert text == "a turquoise, man's box-car -"
    assert found == [
        Word("a", 0, (0,)),
        Word("turquoise", 2, (2, 3)),
        Word("man's", 13, (5,)),
        Word("box-car", 19, (6, 7)),
    ]


def test_a_piece_of_two_words_belongs_to_both_and_marks_to_none():
    assert words_of(Pieces(" in the", " box."), [2, 3])[1] == [
        Word("in", 0, (0,)),
        Word("the", 3, (0,)),
        Word("box", 7, (1,)),
    ]
    assert words_of(Pieces(",", " !"), [2, 3, 1]) == (", !", [])
    assert words_of(Pieces(), [1, 0]) == ("", [])


def test_words_of_the_tokenizers(tokenizer_path, tmp_path):
    of_pieces = SentencePieceTokenizer(tokenizer_path)
    of_words = words.WordTokenizer(words.write_words(CAPTIONS, tmp_path, words.Rules(min_count=1)))
    several = 0
    for tokenizer in (of_pieces, of_words):
        for caption in CAPTIONS:
            ids = tokenizer.encode(caption)
            text, found = words_of(tokenizer, ids)
            assert text == tokenizer.decode(ids)
            assert [word.text for word in found] == word_maps.WORD.findall(text)
            taken = [k for word in found for k in word.tokens]
            assert taken == sorted(set(taken))  # one word after the other
            for word in found:
                assert text.startswith(word.text, word.start)
                assert tokenizer.decode(ids[list(word.tokens)]).strip(":,") == word.text
                several += len(word.tokens) > 1
    assert several > 100


def test_maps_of_words_are_means_over_their_tokens():
    attention = np.random.default_rng(0).dirichlet(np.ones(9), 4)
    maps = word_maps.word_maps(attention, [Word("a", 0, (0,)), Word("bc", 2, (1, 3))])
    assert maps.shape == (2, 3, 3)
    np.testing.assert_allclose(maps[0].ravel(), attention[0], rtol=1e-6)
    assert word_maps.word_maps(attention, []).shape == (0, 3, 3)
    np.testing.assert_allclose(maps[1, 2, 0], (attention[1, 6] + attention[3, 6]) / 2, rtol=1e-6)


def test_the_class_is_no_part_of_the_image():
    attention = np.array([[0.5, 0.1, 0.2, 0.2, 0.0], [1, 0, 0, 0, 0]])
    np.testing.assert_allclose(on_grid(attention)[0], [[0.2, 0.4], [0.4, 0.0]], rtol=1e-6)
    assert not on_grid(attention)[1].any()


@pytest.mark.parametrize("count", [1, 2, 3, 6, 8, 18])
def test_tokens_that_are_no_square_grid(count):
    with pytest.raises(UserError, match=f"{count} tokens do not form a map of the image"):
        on_grid(np.ones((2, count)) / count)


def test_learners_without_attention_are_told():
    word_maps.check_attends(Captioner, by_layer=True)
    with pytest.raises(UserError, match="a DualEncoder has no attention from words"):
        word_maps.check_attends(DualEncoder)

    class OneAttention:
        def attend(self, images, text):
            """Has no argument `layer`."""

    word_maps.check_attends(OneAttention)
    with pytest.raises(UserError, match="a OneAttention has one attention map, not one per layer"):
        word_maps.check_attends(OneAttention, by_layer=True)
