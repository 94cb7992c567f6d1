"""Word-level tokenization, as used by recurrent captioners.

A vocabulary is a readable text file: a header with its settings, then one word and its count per
line, in the order of the ids. Id 0 is padding and also the start token, 1 ends a text, and 2 is the
unknown word. This agrees with publications that use `<start>` = 0 and `<end>` = 1.
"""

import collections
import dataclasses
import hashlib
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
from cap_pretrain.data.text.tokenizers import encodable, read_file
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.untrusted import entry, open_regular, parse_json

WORDS_FILE = "words.tsv"

_TITLE = "# cap_pretrain words"
_SPECIAL = ("<pad>", "<end>", "<unk>")  # caption metrics count a decoded <unk> as a wrong word
_UNKNOWN = 2


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a text is split into words, and which words are kept.

    Attributes:
        tokenization: "simple" deletes all punctuation and splits at white space ("man's" becomes
            "mans", "t-shirt" becomes "tshirt"); "nltk" splits like NLTK's `word_tokenize` (see
            `nltk_words`).
        min_count: words that occur less often in the training captions are unknown. For a published
            threshold of "more than 5", set 6.
        drop_punctuation: drop words without letters and digits.
        drop_letters: drop words of one letter or digit, including "a".
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
        """Return the words of a text, whether or not they are in a vocabulary."""
        words = _SPLITS[self.tokenization](text)
        if self.drop_punctuation:
            words = [word for word in words if any(map(str.isalnum, word))]
        return [word for word in words if len(word) > 1] if self.drop_letters else words


class WordTokenizer:
    """A vocabulary file of `write_words` as a `Tokenizer`; it also holds the rules and the casing.

    Only the arguments are pickled. `vocab_size` includes the three special words. Raises UserError
    if the file is missing or not a vocabulary; or if `max_len` leaves no room for text.
    """

    pad_id, eos_id = 0, 1

    def __init__(self, path: str | os.PathLike, max_len: int = 64):
        if max_len < 2:
            raise UserError(f"tokenizer: max_len is {max_len}; it must be at least 2.")
        self.max_len = max_len
        self._path = os.fspath(path)
        self._rules, self._lower, self._words = _read(files.place(path))
        self._ids = {word: i for i, word in enumerate(self._words)}
        self.vocab_size = len(self._words)
        about = repr((dataclasses.astuple(self._rules), self._lower, self._words, max_len))
        self.identity = hashlib.sha256(about.encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        """Return int32 [max_len]: the words, EOS, then 0. Long texts are truncated but keep EOS."""
        words = self._rules.words(text.lower() if self._lower else text)[: self.max_len - 1]
        ids = np.zeros(self.max_len, np.int32)
        ids[: len(words)] = [self._ids.get(word, _UNKNOWN) for word in words]
        ids[len(words)] = self.eos_id
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words up to the first EOS or padding of `ids` [T], joined by spaces."""
        kept = itertools.takewhile(lambda i: i not in (self.eos_id, self.pad_id), ids)
        return " ".join(self._words[int(i)] for i in kept)

    def __reduce__(self):
        return WordTokenizer, (self._path, self.max_len)


def write_words(
    captions: Iterable[str], out_dir: str | os.PathLike, rules: Rules, lower: bool = True
) -> Path:
    """Count the words of captions, write the vocabulary atomically, and return its path.

    Words are sorted by descending count, then alphabetically, so the file, `words.tsv`, does not
    depend on the order of the captions. `lower` lower-cases captions, here and when encoding.
    Raises UserError if there are no captions or no word is frequent enough, and OSError, with the
    file's name, if it cannot be written, for example because the disk is full.
    """
    counts: collections.Counter[str] = collections.Counter()
    number = 0
    for caption in captions:
        number += 1
        counts.update(rules.words(encodable(caption.lower() if lower else caption)))
    kept = sorted(
        (pair for pair in counts.items() if pair[1] >= rules.min_count),
        key=lambda pair: (-pair[1], pair[0]),
    )
    if not kept:
        raise UserError(
            "tokenizer: there are no captions to take words from."
            if not counts
            else f"text.words.min_count: none of {len(counts)} words occurs {rules.min_count} "
            f"times in {number} captions; lower it."
        )
    unknown = counts.total() - sum(count for _, count in kept)
    made = {"captions": number, "lower": lower, **dataclasses.asdict(rules)}
    lines = [_TITLE, *(f"# {name}: {json.dumps(value)}" for name, value in made.items())]
    lines += [
        f"{word}\t{count}"
        for word, count in (*zip(_SPECIAL, (0, number, unknown), strict=True), *kept)
    ]
    path = files.place(out_dir) / WORDS_FILE
    files.write_text(path, "\n".join(lines) + "\n")
    return path


def is_words_file(path: str | os.PathLike) -> bool:
    """Return whether a file starts like those of `write_words`, a byte-order mark aside."""
    try:
        with open_regular(files.place(path)) as file:
            return (
                file.read(len(_TITLE) + 3).removeprefix(b"\xef\xbb\xbf").startswith(_TITLE.encode())
            )
    except OSError:
        return False


def _read(path: Path) -> tuple[Rules, bool, list[str]]:
    """Return the rules, whether text is lower-cased, and the words in the order of their ids."""
    where = f"tokenizer: {str(path)!r}"
    try:
        lines = read_file(path).decode().split("\n")
        # A word contains no white space, so none starts with "# ".
        header = list(itertools.takewhile(lambda line: line.startswith("# "), lines))
        if header[:1] != [_TITLE]:
            raise ValueError(f"its first line is not {_TITLE!r}")
        made = {
            name: parse_json(value, f"{where}, {name}")
            for name, value in (line.removeprefix("# ").split(": ", 1) for line in header[1:])
        }
        pairs = [line.split("\t") for line in lines[len(header) : -1]]
        words = [word for word, _ in pairs]
    except ValueError as error:
        raise UserError(f"{where} is not a file of words ({error}).") from error
    whole = tuple(words[: len(_SPECIAL)]) == _SPECIAL and not lines[-1]
    if not whole or len(set(words)) < len(words):
        raise UserError(
            f"{where} is not a complete file of words; make one with tools/train_tokenizer.py."
        )
    rules = {
        field.name: entry(made, field.name, type(field.default), where)
        for field in dataclasses.fields(Rules)
    }
    return Rules(**rules), entry(made, "lower", bool, where), words


class _WithoutPunctuation(dict[int, int | None]):
    """A table for `str.translate`: deletes ASCII punctuation and symbols, Unicode punctuation."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        marks = character in string.punctuation or unicodedata.category(character)[0] == "P"
        self[code] = None if marks else code
        return self[code]


_WITHOUT_PUNCTUATION = _WithoutPunctuation()


def simple_words(text: str) -> list[str]:
    """Delete punctuation and split at white space: "A man's t-shirt!" becomes A, mans, tshirt."""
    return text.translate(_WITHOUT_PUNCTUATION).split()


# Marks that are separate words anywhere. A comma or colon before a digit (1,000 and 10:30) is not,
# nor is an apostrophe before a letter.
_MARKS = re.compile(
    r"""( \.{2,} | -- | '' | `+ | (?<=[^\s'])'(?!\w) | [,:](?!\d)
        | ["“”‘’«»„;@#$%&*?!()\[\]{}<>] )""",
    re.VERBOSE,
)
_OPENING = frozenset("([{<")
_CLOSING = frozenset(")]}>\"'»”’") | {"''"}
# Endings that are separate words; and contractions, with the index at which to split them.
_CLITIC = re.compile(r"(?<=[^'])(?:'(?:s|m|d|ll|re|ve)|n't)$", re.IGNORECASE)
_FUSED = {"cannot": 3, "gimme": 3, "gonna": 3, "gotta": 3, "lemme": 3, "wanna": 3, "d'ye": 1}
_FUSED |= {"more'n": 4, "'tis": 2, "'twas": 2}
# Abbreviations, whose period does not end a sentence: u.s., j., mr.
_ABBREVIATION = re.compile(
    r"(?: (?:[^\W\d_]\.)* [^\W\d_] | mr|mrs|ms|dr|st|jr|sr|vs ) \.", re.IGNORECASE | re.VERBOSE
)


def nltk_words(text: str) -> list[str]:
    """Split a caption into words like NLTK's `word_tokenize`, by sentence and Treebank rules.

    Punctuation marks are words. Straight double quotes become `` and ''. "don't" becomes do n't,
    "man's" man 's, and "cannot" can not; t-shirt, 1,000, 3.5 and and/or stay whole. A period is a
    word if it ends a sentence. NLTK learns abbreviations with a model; here there is a short list.
    """
    chunks = text.split()
    return [
        word
        for number, chunk in enumerate(chunks, 1)
        for word in _nltk_chunk(chunk, last=number == len(chunks))
    ]


def _nltk_chunk(chunk: str, last: bool) -> Iterator[str]:
    """Yield the words of a chunk between white space; `last` is set at the end of the text."""
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
