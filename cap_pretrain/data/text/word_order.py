"""Captions with their words reordered: the four shuffles of the ARO benchmark.

Yuksekgonul et al., "When and why vision-language models behave like bags-of-words, and what to do
about it?" (arXiv 2210.01936), section 2.2, and its code (mertyg/vision-language-models-are-bows,
dataset_zoo/perturbations.py). Results are close to the published ones but not exactly comparable,
because of three differences:

  - Punctuation is removed before shuffling, not after, so a negative has exactly the caption's
    words. In ARO, tokens such as "n't" and 's are shuffled separately, which gives some away.
  - Nouns and adjectives are found by the rules of `word_classes`, in ARO by spaCy's tagger.
  - A shuffle that returns the caption, or one known to mean the same, is drawn again, and left out
    if there is no other. In ARO, "a man and a dog" can become "a dog and a man", which is true.
"""

import re
from collections.abc import Callable, Sequence
from random import Random

from cap_pretrain.data.scenes.world import shuffled
from cap_pretrain.data.text.word_classes import ADJECTIVE, NOUN, word_classes

MAX_WORDS = 30  # longer captions are truncated, as in ARO's code
_DRAWS = 50  # tries to find a different order


def words_of(caption: str) -> list[str]:
    """Return the first `MAX_WORDS` words of a caption, in lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", caption.lower())[:MAX_WORDS]


def shuffles(
    caption: str, seed: str, same_meaning: Callable[[str, str], bool] | None = None
) -> dict[str, str]:
    """Return the caption's words in other orders: kind -> shuffled `" ".join(words_of(caption))`.

    `nouns_and_adjectives`: nouns are permuted among nouns, adjectives among adjectives;
    `all_but_nouns_and_adjectives`: the other words are permuted; `trigrams`: groups of three words
    are permuted; `within_trigrams`: the words in each group are. Kinds without a different order
    are left out. Equal seeds give equal results.

    `same_meaning`, if known, returns whether two well-formed captions mean the same. It is used for
    `nouns_and_adjectives` and `trigrams`, which may be well-formed.
    """
    words = words_of(caption)
    true = " ".join(words)
    found = {}
    for kind, shuffle in SHUFFLES.items():
        rng = Random(f"{seed}/{kind}")
        for _ in range(_DRAWS):
            false = " ".join(shuffle(words, rng))
            same = same_meaning if kind in _MAY_BE_WELL_FORMED else None
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
    """Return the words with those at `places` in random order."""
    result = list(words)
    for place, other in zip(places, shuffled(rng, places), strict=True):
        result[place] = words[other]
    return result


def _groups(words: Sequence[str]) -> list[Sequence[str]]:
    return [words[k : k + 3] for k in range(0, len(words), 3)]
