"""How right an answer is, by the rule of the VQA challenge: what people answered, and how many."""

import re
from collections.abc import Iterable, Sequence

# Of the rule: https://visualqa.org/evaluation.html; tables as in github.com/GT-Vision-Lab/VQA,
# PythonEvaluationTools/vqaEvaluation/vqaEval.py.
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
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "couldn't've",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hadn't've",
    "hasn't",
    "haven't",
    "he'd",
    "he'd've",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'd've",
    "it'll",
    "ma'am",
    "might've",
    "mightn't",
    "mightn't've",
    "must've",
    "mustn't",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "'ow's'at",
    "shan't",
    "she'd've",
    "should've",
    "shouldn't",
    "shouldn't've",
    "somebody'd",
    "somebody'd've",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'd've",
    "someone'll",
    "someone's",
    "something'd",
    "something'd've",
    "something'll",
    "that's",
    "there'd",
    "there'd've",
    "there're",
    "there's",
    "they'd",
    "they'd've",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we'd've",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'd've",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "wouldn't've",
    "y'all",
    "y'all'd've",
    "y'all'll",
    "you'd",
    "you'd've",
    "you'll",
    "you're",
    "you've",
]


def _without_an_apostrophe(words: Iterable[str]) -> dict[str, str]:
    """Each word by what is left of it when one of its apostrophes is forgotten."""
    return {
        word[:place] + word[place + 1 :]: word
        for word in words
        for place, character in enumerate(word)
        if character == "'"
    }


_APOSTROPHES = _without_an_apostrophe(_CONTRACTIONS)

LEFT_OUT_MATCHES = 3
"""An answer is right if so many of the other people gave it (Antol et al. 2015, section 3)."""


def normalized(answer: str) -> str:
    """The answer as answers are compared.

    Lower case; punctuation becomes a space, or nothing next to one and in texts with a number like
    1,000; no periods but in decimals; numbers up to ten in digits; no articles; apostrophes where
    they were forgotten.
    """
    text = answer = answer.replace("\n", " ").replace("\t", " ").strip()
    together = _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        apart = not (together or f"{mark} " in answer or f" {mark}" in answer)
        text = text.replace(mark, " " if apart else "")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", text).lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """How right an answer is, of [0, 1], given what one or several people answered.

    With several, the mean over all groups that leave one of them out of min(1, matches / 3), where
    answers are compared `normalized`. With one, whether it is the same, but for case and spaces.

    The challenge's program compares answers as they are where all people agree to the letter.
    """
    if len(references) == 1:
        return float(_plain(answer) == _plain(references[0]))
    given = normalized(answer)
    same = [normalized(reference) == given for reference in references]
    matches = sum(same)
    return sum(min(1.0, (matches - own) / LEFT_OUT_MATCHES) for own in same) / len(same)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
