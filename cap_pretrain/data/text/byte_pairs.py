"""CLIP's tokenizer: byte-pair encoding within words (Radford et al. 2021, 2103.00020, section 2.4).

It is read from the files of `transformers`: tokenizer.json, or merges.txt with vocab.json beside
it. A file of merges alone, such as OpenAI's bpe_simple_vocab_16e6.txt.gz, gives CLIP's vocabulary,
whose order follows from it.

Ids are those of the files plus one, because id 0 is padding here and "!" there. The ids are those
of `transformers`, with two exceptions: the name of a special token in a text, such as
"<|endoftext|>", is text; and OpenAI's and OpenCLIP's own code first unescapes HTML and repairs
broken encodings, which `transformers` and this module do not.
"""

import functools
import hashlib
import heapq
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cap_pretrain import files
from cap_pretrain.data.text.tokenizers import MAX_FILE, MAX_VOCABULARY, encodable
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import (
    bounded,
    check_parsed,
    checked,
    entry,
    is_text,
    open_regular,
    parse_json,
    read_bounded,
    shown,
)

JSON, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
START, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"  # of a token that ends a word

_HEADER = b"#version"  # in the first line of files of merges
_CLIP_MERGES = 49_152 - 256 - 2  # which CLIP uses of those in OpenAI's file

# How CLIP splits texts into words, in the syntax of `tokenizers`; `words_of` does the same.
_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_SPECIAL = "".join(f"{re.escape(name)}|" for name in (START, END))

_NORMALIZERS = [
    {"type": "NFC"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Lowercase"},
]

MAX_CACHED = 2**16
"""Words whose tokens are kept, so that common ones are encoded once."""

MAX_CACHED_WORD = 64
"""Longest word whose tokens are kept, in bytes."""

MAX_MERGES = 2**19
"""Most merges in a file; OpenAI's has 262,144."""


class BytePairs(NamedTuple):
    """A vocabulary: the ids of tokens in the files, and pairs of tokens, first merged first."""

    ids: Mapping[str, int]
    merges: Sequence[tuple[str, str]]


class BytePairTokenizer:
    """The tokenizer in such a file as a `Tokenizer`; only the arguments are pickled.

    A row begins with START. Raises UserError if a file is missing or is not of CLIP's tokenizer, or
    if `max_len` leaves no room for text.
    """

    pad_id = 0

    def __init__(self, path: str | os.PathLike, max_len: int = 77):
        if max_len < 3:
            raise UserError(f"tokenizer: max_len is {max_len}; it must be at least 3.")
        self.max_len = max_len
        self._path = os.fspath(path)
        pairs = read(files.place(path))
        self._ids = {token: n + 1 for token, n in pairs.ids.items()}
        self._tokens = {n: token for token, n in self._ids.items()}
        self._ranks = {pair: n for n, pair in enumerate(pairs.merges)}
        self._start, self.eos_id = self._ids[START], self._ids[END]
        self.vocab_size = len(self._ids) + 1
        self.identity = f"{hashlib.sha256(content(pairs)).hexdigest()} {max_len}"
        self._of_short_word = functools.lru_cache(MAX_CACHED)(self._encode_word)

    def encode(self, text: str) -> np.ndarray:
        """Return int32 [max_len]: START, the tokens, EOS, then 0; a long text keeps EOS."""
        ids = [self._start]
        for word in words_of(normalized(text)):
            is_short = len(word.encode()) <= MAX_CACHED_WORD
            ids += self._of_short_word(word) if is_short else self._encode_word(word)
            if len(ids) >= self.max_len:
                break
        ids = [*ids[: self.max_len - 1], self.eos_id]
        return np.pad(np.array(ids, np.int32), (0, self.max_len - len(ids)))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text up to the first EOS or padding of `ids` [T], in lower case."""
        found = []
        for n in map(int, ids):
            if n in (self.eos_id, self.pad_id):
                break
            if n != self._start:
                found.append(self._tokens.get(n, ""))
        data = bytes(_BYTES.get(c, ord("?")) for c in "".join(found).replace(SUFFIX, " "))
        return data.decode("utf-8", "replace").strip()

    def _encode_word(self, word: str) -> tuple[int, ...]:
        letters = [_LETTERS[byte] for byte in word.encode()]
        letters[-1] += SUFFIX
        return tuple(self._ids[token] for token in merged(letters, self._ranks))

    def __reduce__(self):
        return BytePairTokenizer, (self._path, self.max_len)


def normalized(text: str) -> str:
    """Return a text in Unicode's composed form (NFC), with single spaces, in lower case."""
    text = unicodedata.normalize("NFC", encodable(text))
    text = "".join(" " if _is_space(c) else c for c in text)
    # By character, as `tokenizers` does: Python lower-cases a sigma at the end of a word otherwise.
    return "".join(c.lower() for c in re.sub(" +", " ", text))


def _is_space(c: str) -> bool:
    return c.isspace() and not "\x1c" <= c <= "\x1f"  # which only Python counts


def words_of(text: str) -> Iterator[str]:
    """Yield the words of a normalized text: contractions, letters, single digits, and the rest."""
    kinds = [_kind(c) for c in text]
    start = 0
    while start < len(text):
        kind = kinds[start]
        end = start + 1
        short = next((c for c in _CONTRACTIONS if text.startswith(c, start)), "")
        if short:
            end = start + len(short)
        elif kind != "N":
            while end < len(text) and kinds[end] == kind:
                end += 1
        if kind != " ":
            yield text[start:end]
        start = end


def _kind(c: str) -> str:
    """Return L for a letter, N for a digit or other number, a space, or P for all else."""
    kind = unicodedata.category(c)[0]
    return kind if kind in "LN" else " " if _is_space(c) else "P"


def merged(tokens: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Merge adjacent tokens, always the first of the pairs with the lowest rank, and return them.

    The time is n log n, so that a long word of a stranger does no harm.
    """
    parts: list[str | None] = list(tokens)
    after = [*range(1, len(parts)), -1]
    before = list(range(-1, len(parts) - 1))
    queue: list[tuple[int, int, str, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right >= 0:
            pair: Any = (parts[left], parts[right])
            if pair in ranks:
                heapq.heappush(queue, (ranks[pair], left, *pair))

    for n in range(len(parts) - 1):
        offer(n, n + 1)
    while queue:
        _, left, first, second = heapq.heappop(queue)
        right = after[left]
        if right < 0 or (parts[left], parts[right]) != (first, second):
            continue  # one of them has been merged since
        parts[left], parts[right] = first + second, None
        after[left] = after[right]
        if after[left] >= 0:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    return [part for part in parts if part is not None]


def _letters() -> list[str]:
    """Return the characters that stand for the 256 bytes: themselves if they can be printed."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    others = [byte for byte in range(256) if byte not in printable]
    found = {byte: chr(byte) for byte in printable}
    found |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [found[byte] for byte in (*range(256),)]


_LETTERS = _letters()
_BYTES = {letter: byte for byte, letter in enumerate(_LETTERS)} | {" ": ord(" ")}


def is_byte_pairs_file(path: str | os.PathLike) -> bool:
    """Return whether a file starts like one that `read` reads: with JSON, a header, or gzipped."""
    try:
        with open_regular(files.place(path)) as file:
            begin = file.read(256)
    except OSError:
        return False
    return begin[:1] == b"{" or begin[:2] == b"\x1f\x8b" or _HEADER in begin.split(b"\n")[0]


def read(path: Path) -> BytePairs:
    """Read a vocabulary from a file; see the module. Raises UserError if it is not CLIP's."""
    data = _read(path)
    if data[:1] == b"{":
        pairs = _from_json(_parse(data, path), path)
    else:
        pairs = _from_merges(data, path)
    lacking = [t for letter in _LETTERS for t in (letter, letter + SUFFIX) if t not in pairs.ids]
    lacking += [name for name in (START, END) if name not in pairs.ids]
    if lacking or {*pairs.ids.values()} != {*range(len(pairs.ids))}:
        what = f"it lacks {lacking[0]!r}" if lacking else "its ids are not 0, 1, 2 and so on"
        raise UserError(f"{path}: is not the vocabulary of CLIP's tokenizer: {what}.")
    for pair in pairs.merges:
        if any(token not in pairs.ids for token in (*pair, "".join(pair))):
            raise UserError(f"{path}: merges {' '.join(pair)[:80]!r}, which has no id.")
    return pairs


def _read(path: Path) -> bytes:
    data = read_bounded(path, MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise UserError(f"tokenizer: {path} has over {MAX_FILE} bytes, so it is none.")
    return data


def _parse(data: bytes, path: Path) -> Any:
    check_parsed(data, path)
    return parse_json(data, path)


def _from_json(content: Any, path: Path) -> BytePairs:
    model = entry(content, "model", dict, path)
    splits = checked(content.get("pre_tokenizer") or {}, "pre_tokenizer", dict, path)
    steps = checked(content.get("normalizer") or {}, "normalizer", dict, path)
    if (
        model.get("type", "BPE") != "BPE"
        or model.get("end_of_word_suffix") != SUFFIX
        or steps.get("normalizers") != _NORMALIZERS
        or _PATTERN not in json.dumps(splits).replace("\\\\", "\\")
    ):
        raise UserError(
            f"{path}: is not CLIP's tokenizer, byte pairs within words in lower case, the only "
            f"{JSON} that can be read."
        )
    ids = dict(_checked_ids(entry(model, "vocab", dict, path), path))
    for token in checked(content.get("added_tokens") or [], "added_tokens", list, path):
        name = entry(token, "content", str, path)
        if name in (START, END):
            ids[name] = bounded(entry(token, "id", int, path), name, 0, MAX_VOCABULARY, path)
    merges = entry(model, "merges", list, path)
    _check_count(len(merges), path)
    pairs = (pair.split(" ", 2) if isinstance(pair, str) else pair for pair in merges)
    return BytePairs(ids, _checked_merges(pairs, path))


def _from_merges(data: bytes, path: Path) -> BytePairs:
    _check_count(data.count(b"\n"), path)  # before they take memory as a list
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not a file of merges in UTF-8.") from error
    merges = (line.split(maxsplit=2) for line in lines[1:] if line.strip())
    beside = path.with_name(VOCABULARY)
    if beside.is_file():
        ids = dict(_checked_ids(_parse(_read(beside), beside), beside))
        return BytePairs(ids, _checked_merges(merges, path))
    pairs = _checked_merges(itertools.islice(merges, _CLIP_MERGES), path)
    # The order of the bytes is that of the characters which stand for them.
    letters = sorted(_LETTERS)
    tokens = [*letters, *(letter + SUFFIX for letter in letters), *map("".join, pairs), START, END]
    return BytePairs({token: n for n, token in enumerate(tokens)}, pairs)


def _checked_ids(vocabulary: Any, path: Path) -> Iterator[tuple[str, int]]:
    checked(vocabulary, VOCABULARY, dict, path)
    for token, n in vocabulary.items():
        if not is_text(token):
            raise UserError(f"{path}: the token {shown(token)} has half a surrogate pair.")
        yield token, bounded(n, f"id of {shown(token)}", 0, MAX_VOCABULARY, path)


def _check_count(merges: int, path: Path) -> None:
    if merges > MAX_MERGES:
        raise UserError(f"{path}: has over {MAX_MERGES:,} merges, too many for CLIP's tokenizer.")


def _checked_merges(merges: Iterable[Any], path: Path) -> list[tuple[str, str]]:
    found = []
    for pair in merges:
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(t) is str for t in pair)):
            raise UserError(f"{path}: has a merge that is not of two tokens.")
        found.append((pair[0], pair[1]))
    return found


def content(pairs: BytePairs) -> bytes:
    """Return a tokenizer.json of these pairs, which `transformers` and `read` read."""
    special = [
        {"id": pairs.ids[name], "content": name, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for name in sorted((START, END), key=lambda name: pairs.ids[name])
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": _SPECIAL + _PATTERN},
        "behavior": "Removed",
        "invert": True,
    }
    of_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    of_bytes["use_regex"] = True
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": _NORMALIZERS},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, of_bytes]},
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, pairs.ids[END]],
            "cls": [START, pairs.ids[START]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": of_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": SUFFIX,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(pairs.ids.items(), key=lambda item: item[1])),
            "merges": [list(pair) for pair in pairs.merges],
        },
    }
    return (json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n").encode()


def special_ids(data: bytes) -> dict[str, int]:
    """Return the ids of special tokens in a tokenizer.json of `content`, by their names there."""
    ids = {token["content"]: token["id"] for token in json.loads(data)["added_tokens"]}
    return {"pad_token_id": ids[END], "eos_token_id": ids[END], "bos_token_id": ids[START]}


def exported(data: bytes, length: int) -> dict[str, bytes]:
    """Return the files of a tokenizer for `transformers`, given a tokenizer.json of `content`."""
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), END),
        "clean_up_tokenization_spaces": False,
    }
    return {JSON: data, "tokenizer_config.json": (json.dumps(settings, indent=1) + "\n").encode()}
