"""Shuffles keep what they claim to keep, and word classes fit captions."""

from collections import Counter
from random import Random

import pytest

from cap_pretrain.data.text.word_classes import ADJECTIVE, NOUN, word_classes
from cap_pretrain.data.text.word_order import MAX_WORDS, SHUFFLES, shuffles, words_of

CAPTIONS = [
    "A small brown dog jumps over the old fence, while two girls watch.",
    "Two men in red jackets are climbing the steep side of a snowy mountain!",
    "The woman's t-shirt is blue; her long-haired cat sits on a wooden table.",
    "A boy is making a splash in a swimming pool .",
]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_every_shuffle_has_the_captions_words_in_another_order(caption):
    words = words_of(caption)
    found = shuffles(caption, "a")
    assert found.keys() == SHUFFLES.keys()
    for kind, text in found.items():
        assert text != " ".join(words), kind
        assert Counter(text.split()) == Counter(words), kind


@pytest.mark.parametrize("caption", CAPTIONS)
def test_each_kind_moves_its_own_words_only(caption):
    words = words_of(caption)
    classes = word_classes(words)
    for seed in range(5):
        found = {kind: text.split() for kind, text in shuffles(caption, str(seed)).items()}
        for k, word in enumerate(words):
            moves = classes[k] in (NOUN, ADJECTIVE)
            assert (
                found["all_but_nouns_and_adjectives" if moves else "nouns_and_adjectives"][k]
                == word
            )
        for wanted in (NOUN, ADJECTIVE):
            of_class = [k for k, c in enumerate(classes) if c == wanted]
            moved = [found["nouns_and_adjectives"][k] for k in of_class]
            assert sorted(moved) == sorted(words[k] for k in of_class)
        groups = [words[k : k + 3] for k in range(0, len(words), 3)]
        within = found["within_trigrams"]
        for k, group in enumerate(groups):
            assert sorted(within[3 * k : 3 * k + 3]) == sorted(group)
        last = found["trigrams"]
        for group in groups:
            assert any(last[k : k + len(group)] == group for k in range(len(words)))


def test_the_seed_decides():
    one, other = shuffles(CAPTIONS[0], "1"), shuffles(CAPTIONS[0], "2")
    assert one == shuffles(CAPTIONS[0], "1")
    assert all(one[kind] != other[kind] for kind in one)


def test_what_has_no_other_order_is_left_out():
    assert shuffles("dog", "") == {}
    assert shuffles("a dog", "").keys() == {"within_trigrams"}
    assert shuffles("dog dog dog dog", "") == {}
    assert shuffles("", "") == {}


def test_orders_that_say_the_same_are_not_taken():
    caption = "a red circle and a blue ring"

    def same(one, other):
        one, other = ({tuple(x.split()[-2:]) for x in text.split(" and ")} for text in (one, other))
        return one == other

    assert "a blue ring and a red circle" in {
        shuffles(caption, str(k))["nouns_and_adjectives"] for k in range(20)
    }
    for k in range(20):
        found = shuffles(caption, str(k), same)
        assert found["nouns_and_adjectives"] in (
            "a blue circle and a red ring",
            "a red ring and a blue circle",
        )
        assert len(found) == 4


def test_words_are_lower_case_without_punctuation_and_not_too_many():
    assert words_of('He said: "A man\'s T-shirt, (blue)!"  snow_man') == (
        ["he", "said", "a", "man's", "t-shirt", "blue", "snow", "man"]
    )
    assert len(words_of("word " * 40)) == MAX_WORDS


# Expected classes by the Penn Treebank guidelines: n is NN*, a is JJ*, - is anything else.
TAGGED = [
    ("a small brown dog jumps over the old fence", "-aan---an"),
    ("two dogs run through a field of tall grass", "-n---n-an"),
    ("the black and white cat sits on a wooden table", "-a-an---an"),
    ("a man in a striped shirt takes a jump on his bike", "-n--an--n--n"),
    ("a family is watching the parade from a tall building", "-n---n--an"),
    ("children play soccer in front of the red house", "n-n-n--an"),
    ("a girl with curly hair wears a long-sleeved shirt", "-n-an--an"),
    ("a bed with colorful pillows stands by the window", "-n-an---n"),
    ("three people walk down a crowded street at night", "-n---an-n"),
    ("a young woman quickly climbs up a dangerous cliff", "-an----an"),
]


@pytest.mark.parametrize(("caption", "expected"), TAGGED)
def test_word_classes_of_captions(caption, expected):
    letters = {NOUN: "n", ADJECTIVE: "a"}
    assert "".join(letters.get(c, "-") for c in word_classes(caption.split())) == expected


def test_word_classes_take_any_words():
    rng = Random(0)
    letters = "aeinrstdlyg'-é7"
    words = ["".join(rng.choice(letters) for _ in range(rng.randrange(1, 9))) for _ in range(500)]
    assert len(word_classes(words)) == 500 and word_classes([]) == []
