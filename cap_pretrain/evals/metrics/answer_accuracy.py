"""Accuracy of an answer by the rule of the VQA challenge, from the answers of several people."""

import re
from collections.abc import Iterable, Sequence

# The rule is at https://visualqa.org/evaluation.html; the tables are those of
# github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py.
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
_CONTRACTIONS = [
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't",
    "don't", "hadn't", "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd",
    "how'll", "how's", "isn't", "it'd", "it'd've", "it'll", "ma'am", "might've", "mightn't",
    "mightn't've", "must've", "mustn't", "needn't", "not've", "o'clock", "oughtn't", "'ow's'at",
    "shan't", "she'd've", "should've", "shouldn't", "shouldn't've", "somebody'd", "somebody'd've",
    "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll", "someone's",
    "something'd", "something'd've", "something'll", "that's", "there'd", "there'd've",
    "there're", "there's", "they'd", "they'd've", "they'll", "they're", "they've", "'twas",
    "wasn't", "we'd've", "we've", "weren't", "what'll", "what're", "what's", "what've", "when's",
    "where'd", "where's", "where've", "who'd", "who'd've", "who'll", "who's", "who've", "why'll",
    "why're", "why's", "won't", "would've", "wouldn't", "wouldn't've", "y'all", "y'all'd've",
    "y'all'll", "you'd", "you'd've", "you'll", "you're", "you've"
]  # fmt: skip


def _without_an_apostrophe(words: Iterable[str]) -> dict[str, str]:
    """Map each word without one of its apostrophes to the word."""
    return {
        word[:place] + word[place + 1 :]: word
        for word in words
        for place, character in enumerate(word)
        if character == "'"
    }


_APOSTROPHES = _without_an_apostrophe(_CONTRACTIONS)

LEFT_OUT_MATCHES = 3
"""An answer that so many of the other people gave is correct (Antol et al. 2015, section 3)."""


def normalized(answer: str) -> str:
    """Return an answer in the normal form in which answers are compared.

    The text is lower-cased. Punctuation becomes a space, or is removed where it is next to a space
    or where the text has a number like 1,000. Periods are removed except in decimals. Numbers up to
    ten become digits, articles are removed, and missing apostrophes of contractions are restored.
    """
    text = answer = answer.replace("\n", " ").replace("\t", " ").strip()
    together = _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        apart = not (together or f"{mark} " in answer or f" {mark}" in answer)
        text = text.replace(mark, " " if apart else "")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", text).lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """Return the accuracy in [0, 1] of an answer, given the answers of one or several people.

    With several references, the accuracy is min(1, matches / 3), averaged over all subsets that
    leave out one person; answers are compared `normalized` (the challenge's program does not
    normalize where all people give the exact same answer). With one reference, it is 1 for the same
    text up to case and spaces, else 0.
    """
    if len(references) == 1:
        return float(_plain(answer) == _plain(references[0]))
    given = normalized(answer)
    same = [normalized(reference) == given for reference in references]
    matches = sum(same)
    return sum(min(1.0, (matches - own) / LEFT_OUT_MATCHES) for own in same) / len(same)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
