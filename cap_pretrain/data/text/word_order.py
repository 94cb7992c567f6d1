"""Captions with their words in another order: the four shuffles of the ARO paper.

Yuksekgonul et al., "When and why vision-language models behave like bags-of-words, and what to do
about it?" (arXiv 2210.01936), section 2.2, and its code (mertyg/vision-language-models-are-bows,
dataset_zoo/perturbations.py). What differs from that code, so that figures are near to the
published ones but not comparable to the last point:

  - Punctuation is taken away before shuffling, not after: a negative has exactly the caption's
    words. There, tokens such as "n't" and 's are shuffled on their own, which gives some away.
  - Nouns and adjectives are found by the rules of `word_classes`, there by spaCy's tagger.
  - A shuffle that gives the caption back, or one known to say the same, is drawn again, or left
    out where there is no other. Elsewhere "a man and a dog" can become a true "a dog and a man".
"""

import re
from collections.abc import Callable, Sequence
from random import Random

from cap_pretrain.data.scenes.world import shuffled
from cap_pretrain.data.text.word_classes import ADJECTIVE, NOUN, word_classes

MAX_WORDS = 30
"""Longer captions are cut, as ARO's code does."""

_DRAWS = 50  # after which no different order is expected any more


def words_of(caption: str) -> list[str]:
    """The first MAX_WORDS words of a caption, in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", caption.lower())[:MAX_WORDS]


def shuffles(
    caption: str, seed: str, says_the_same: Callable[[str, str], bool] | None = None
) -> dict[str, str]:
    """The caption's words in other orders.

    Args:
        caption: any text; compare the results with `" ".join(words_of(caption))`.
        seed: the same gives the same.
        says_the_same: whether two well-formed captions do, if anybody knows. It is asked of the
            kinds that may give such: `nouns_and_adjectives` and `trigrams`.

    Returns:
        kind -> shuffled caption. `nouns_and_adjectives`: nouns change places with nouns, adjectives
        with adjectives; `all_but_nouns_and_adjectives`: the other words do; `trigrams`: groups of
        three words change places; `within_trigrams`: the words of each group do. Kinds without a
        different order are left out.
    """
    words = words_of(caption)
    true = " ".join(words)
    found = {}
    for kind, shuffle in SHUFFLES.items():
        rng = Random(f"{seed}/{kind}")
        for _ in range(_DRAWS):
            false = " ".join(shuffle(words, rng))
            same = says_the_same if kind in _MAY_BE_WELL_FORMED else None
            if false != true and not (same and same(true, false)):
                found[kind] = false
                break
    return found


def _nouns_and_adjectives(words: Sequence[str], rng: Random) -> list[str]:
    classes = word_classes(words)
    for wanted in (NOUN, ADJECTIVE):
        words = _among([k for k, found in enumerate(classes) if found == wanted], words, rng)
    return list(words)


def _all_but_nouns_and_adjectives(words: Sequence[str], rng: Random) -> list[str]:
    classes = word_classes(words)
    places = [k for k, found in enumerate(classes) if found not in (NOUN, ADJECTIVE)]
    return _among(places, words, rng)


def _trigrams(words: Sequence[str], rng: Random) -> list[str]:
    return [word for group in shuffled(rng, _groups(words)) for word in group]


def _within_trigrams(words: Sequence[str], rng: Random) -> list[str]:
    return [word for group in _groups(words) for word in shuffled(rng, group)]


SHUFFLES: dict[str, Callable[[Sequence[str], Random], list[str]]] = {
    "nouns_and_adjectives": _nouns_and_adjectives,
    "all_but_nouns_and_adjectives": _all_but_nouns_and_adjectives,
    "trigrams": _trigrams,
    "within_trigrams": _within_trigrams,
}
_MAY_BE_WELL_FORMED = ("nouns_and_adjectives", "trigrams")


def _among(places: Sequence[int], words: Sequence[str], rng: Random) -> list[str]:
    """The words, those at `places` in an order drawn by lot."""
    result = list(words)
    for place, other in zip(places, shuffled(rng, places), strict=True):
        result[place] = words[other]
    return result


def _groups(words: Sequence[str]) -> list[Sequence[str]]:
    return [words[k : k + 3] for k in range(0, len(words), 3)]
