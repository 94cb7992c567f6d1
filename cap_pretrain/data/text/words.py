"""Whole words as tokens, as recurrent captioners have them: the rules, the vocabulary, its file.

A vocabulary is a text file that people can read: what it was made by, then a word and its count a
line, in order of the ids. Id 0 pads and stands before the first word, 1 ends a text and 2 stands
for every unknown word; so where a source writes `<start>` = 0 and `<end>` = 1, it is so here too.
"""

import collections
import dataclasses
import itertools
import json
import os
import re
import string
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from cap_pretrain import files
from cap_pretrain.errors import UserError, did_you_mean

WORDS_FILE = "words.tsv"

_TITLE = "# cap_pretrain words"
_SPECIAL = ("<pad>", "<end>", "<unk>")
_UNKNOWN = 2


@dataclasses.dataclass(frozen=True)
class Rules:
    """What counts as a word, and which words are kept.

    Attributes:
        tokenization: "simple" deletes punctuation, wherever it stands, and splits at white space
            ("man's" is "mans", "t-shirt" "tshirt"); "nltk" splits as NLTK's `word_tokenize` does,
            see `nltk_words`.
        min_count: a word that the training captions have fewer times is unknown. A threshold of
            "more than 5" is 6.
        drop_punctuation: leave out what holds no letter and no digit.
        drop_letters: leave out words of one letter or digit, "a" among them.
    """

    tokenization: str = "simple"
    min_count: int = 1
    drop_punctuation: bool = False
    drop_letters: bool = False

    def __post_init__(self):
        if self.tokenization not in _SPLITS:
            raise UserError(
                f"text.words.tokenization: {self.tokenization!r} is unknown."
                f"{did_you_mean(self.tokenization, _SPLITS)}"
            )
        if self.min_count < 1:
            raise UserError(f"text.words.min_count: {self.min_count} must be at least 1.")

    def words(self, text: str) -> list[str]:
        """The words of a text, known or not."""
        words = _SPLITS[self.tokenization](text)
        if self.drop_punctuation:
            words = [word for word in words if any(map(str.isalnum, word))]
        return [word for word in words if len(word) > 1] if self.drop_letters else words


class WordTokenizer:
    """A vocabulary of words with fixed-length output: id 0 pads, EOS ends every text.

    Its rules and casing are those of the file. Pickles as its arguments.

    Attributes:
        vocab_size: number of words, the three special ones included.
        pad_id: always 0.
        eos_id: the id that ends a text, 1.
        max_len: length of an encoded row.
    """

    pad_id, eos_id = 0, 1

    def __init__(self, path: str | os.PathLike, max_len: int = 64):
        """Opens a file of `write_words`.

        Args:
            path: the file.
            max_len: number of ids in an encoded row, EOS included.

        Raises:
            UserError: there is no such file or it is not one of words; or `max_len` leaves no room
                for text.
        """
        if max_len < 2:
            raise UserError(f"tokenizer: max_len is {max_len}; it must be at least 2.")
        self.max_len = max_len
        self._path = os.fspath(path)
        self._rules, self._lower, self._words = _read(Path(path))
        self._ids = {word: i for i, word in enumerate(self._words)}
        self.vocab_size = len(self._words)

    def encode(self, text: str) -> np.ndarray:
        """Returns int32 [max_len]: the words, EOS, then 0; a long text is cut, EOS kept."""
        words = self._rules.words(text.lower() if self._lower else text)[: self.max_len - 1]
        ids = np.zeros(self.max_len, np.int32)
        ids[: len(words)] = [self._ids.get(word, _UNKNOWN) for word in words]
        ids[len(words)] = self.eos_id
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the words up to the first EOS or padding of `ids` [T], joined by spaces.

        An unknown word is "<unk>", which a caption metric counts as the word that it is not.
        """
        said = itertools.takewhile(lambda i: i not in (self.eos_id, self.pad_id), ids)
        return " ".join(self._words[int(i)] for i in said)

    def __reduce__(self):
        return WordTokenizer, (self._path, self.max_len)


def write_words(
    captions: Iterable[str], out_dir: str | os.PathLike, rules: Rules, lower: bool = True
) -> Path:
    """Counts the words of captions and writes the vocabulary, `words.tsv`.

    The same captions in any order give the same file: the more frequent words come first, equally
    frequent ones in alphabetical order.

    Args:
        captions: one text each.
        out_dir: folder to write into, made when missing.
        rules: what counts as a word.
        lower: lower-case the captions first; encoding will.

    Returns:
        The path of the file, which appears only when complete.

    Raises:
        UserError: there are no captions, or none of their words is frequent enough.
        OSError: with the name of the file, as when the disk is full.
    """
    counts: collections.Counter[str] = collections.Counter()
    number = 0
    for caption in captions:
        number += 1
        counts.update(rules.words(caption.lower() if lower else caption))
    kept = sorted(
        (pair for pair in counts.items() if pair[1] >= rules.min_count),
        key=lambda pair: (-pair[1], pair[0]),
    )
    if not kept:
        raise UserError(
            "tokenizer: there are no captions to take words from."
            if not counts
            else f"text.words.min_count: none of {len(counts)} words comes {rules.min_count} times "
            f"in {number} captions; lower it."
        )
    unknown = counts.total() - sum(count for _, count in kept)
    made = {"captions": number, "lower": lower, **dataclasses.asdict(rules)}
    lines = [_TITLE, *(f"# {name}: {json.dumps(value)}" for name, value in made.items())]
    lines += [
        f"{word}\t{count}"
        for word, count in (*zip(_SPECIAL, (0, number, unknown), strict=True), *kept)
    ]
    path = Path(out_dir) / WORDS_FILE
    files.write_text(path, "\n".join(lines) + "\n")
    return path


def is_words_file(path: str | os.PathLike) -> bool:
    """Whether a file begins as those of `write_words` do."""
    try:
        with open(path, "rb") as file:
            return file.read(len(_TITLE)) == _TITLE.encode()
    except OSError:
        return False


def _read(path: Path) -> tuple[Rules, bool, list[str]]:
    """Returns rules, casing and words in order of their ids."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(
            f"tokenizer: cannot read the words {str(path)!r} ({error.strerror}); give the path of "
            "a file of words or make one with tools/train_tokenizer.py."
        ) from error
    except ValueError as error:
        raise UserError(f"tokenizer: {str(path)!r} is no file of words.") from error
    try:
        # A word holds no white space, so none of them begins with "# ".
        header = list(itertools.takewhile(lambda line: line.startswith("# "), lines))
        made = {
            name: json.loads(value)
            for name, value in (line.removeprefix("# ").split(": ", 1) for line in header[1:])
        }
        names = [field.name for field in dataclasses.fields(Rules)]
        rules, lower = Rules(**{name: made[name] for name in names}), made["lower"]
        pairs = [line.split("\t") for line in lines[len(header) : -1]]
        words = [word for word, _ in pairs]
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"tokenizer: {str(path)!r} is no file of words ({error}).") from error
    if header[0] != _TITLE or tuple(words[: len(_SPECIAL)]) != _SPECIAL or lines[-1]:
        raise UserError(
            f"tokenizer: {str(path)!r} is no whole file of words; make one with "
            "tools/train_tokenizer.py."
        )
    return rules, lower, words


class _WithoutPunctuation(dict):
    """For `str.translate`: deletes ASCII's punctuation and symbols, and Unicode's punctuation."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        marks = character in string.punctuation or unicodedata.category(character)[0] == "P"
        self[code] = None if marks else code
        return self[code]


_WITHOUT_PUNCTUATION = _WithoutPunctuation()


def simple_words(text: str) -> list[str]:
    """Deletes punctuation and splits at white space: "A man's t-shirt!" is A, mans, tshirt."""
    return text.translate(_WITHOUT_PUNCTUATION).split()


# Marks that are words of their own wherever they stand. A comma or colon before a digit (1,000 and
# 10:30) is not, nor is an apostrophe before a letter.
_MARKS = re.compile(
    r"""( \.{2,} | -- | '' | `+ | (?<=[^\s'])'(?!\w) | [,:](?!\d)
        | ["“”‘’«»„;@#$%&*?!()\[\]{}<>] )""",
    re.VERBOSE,
)
_OPENING = frozenset("([{<")
_CLOSING = frozenset(")]}>\"'»”’") | {"''"}
# Ends of words that are words of their own, and words that are two: where they are cut.
_CLITIC = re.compile(r"(?<=[^'])(?:'(?:s|m|d|ll|re|ve)|n't)$", re.IGNORECASE)
_FUSED = {"cannot": 3, "gimme": 3, "gonna": 3, "gotta": 3, "lemme": 3, "wanna": 3, "d'ye": 1}
_FUSED |= {"more'n": 4, "'tis": 2, "'twas": 2}
# Whose full stop ends no sentence: u.s., j., mr.
_ABBREVIATION = re.compile(
    r"(?: (?:[^\W\d_]\.)* [^\W\d_] | mr|mrs|ms|dr|st|jr|sr|vs ) \.", re.IGNORECASE | re.VERBOSE
)


def nltk_words(text: str) -> list[str]:
    """Splits a caption as NLTK's `word_tokenize` does: its sentences, and those by Treebank rules.

    Punctuation marks are words, straight double quotes become `` and '', "don't" is do n't, "man's"
    man 's, "cannot" can not; t-shirt, 1,000, 3.5 and and/or stay whole. A full stop is a word where
    it ends a sentence. NLTK has learned which abbreviations have one; here there is a short list.
    """
    chunks = text.split()
    return [
        word
        for number, chunk in enumerate(chunks, 1)
        for word in _nltk_chunk(chunk, last=number == len(chunks))
    ]


def _nltk_chunk(chunk: str, last: bool) -> Iterator[str]:
    """Yields the words of what stands between white space; `last`: at the end of the text."""
    parts = [part for part in _MARKS.split(chunk) if part]
    closing = sum(1 for _ in itertools.takewhile(_CLOSING.__contains__, reversed(parts)))
    for k, part in enumerate(parts):
        if part == '"':
            yield "``" if k == 0 or parts[k - 1] in _OPENING else "''"
        elif _MARKS.fullmatch(part):
            yield part
        else:
            ends = k == len(parts) - closing - 1 and len(part) > 1 and part.endswith(".")
            ends = ends and (last or not _ABBREVIATION.fullmatch(part))
            word = part[:-1] if ends else part
            clitic = _CLITIC.search(word)
            cut = clitic.start() if clitic else _FUSED.get(word.lower(), len(word))
            yield from filter(None, (word[:cut], word[cut:], "." if ends else ""))


_SPLITS = {"simple": simple_words, "nltk": nltk_words}
