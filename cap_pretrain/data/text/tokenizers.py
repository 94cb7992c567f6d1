"""Subword tokenizers: encode captions as fixed-length rows of ids, decode them, train a model."""

import hashlib
import io
import itertools
import json
import os
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from cap_pretrain import files
from cap_pretrain.data.regions import regions_of
from cap_pretrain.data.sources import passes
from cap_pretrain.data.sources.base import Source, without_image
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import open_regular

# Larger corpora are sampled down to this, enough for 32k pieces: the trainer holds all in memory.
_TRAIN_CAPTIONS = 1_000_000
# Rarer characters (the last 0.01% of the text) become the unknown piece, so that a few emoji do
# not take the place of words. The default, 0.9995, would drop letters in small corpora.
_CHARACTER_COVERAGE = 0.9999

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

MAX_VOCABULARY = 2**24
"""Largest vocabulary that can be asked for; sentencepiece reserves memory for all of it."""

MAX_FILE = 2**26
"""Most bytes of a tokenizer's file; models of a million pieces have some 20 MB."""


class TextEncoder(Protocol):
    """The part of a tokenizer that turns captions into fixed-length rows of ids; picklable.

    `vocab_size` is the number of different ids; `pad_id`, always 0, is also the decoder's start
    token; `eos_id` ends every text; `max_len` is T, the length of an encoded row, EOS included.
    """

    vocab_size: int
    pad_id: int
    eos_id: int
    max_len: int

    def encode(self, text: str) -> np.ndarray:
        """Return int32 [T]: the tokens, EOS, then 0. A long text is truncated but keeps EOS."""


class Tokenizer(TextEncoder, Protocol):
    """A `TextEncoder` that also decodes."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text up to the first EOS or padding of `ids` [T]."""


class NoText:
    """A tokenizer for learners that read no text: every text is empty."""

    pad_id = eos_id = vocab_size = max_len = 0

    def encode(self, text: str) -> np.ndarray:  # noqa: ARG002 - the interface of TextEncoder
        """Return int32 [0]."""
        return np.zeros(0, np.int32)

    def decode(self, ids: Iterable[int]) -> str:  # noqa: ARG002 - the interface of Tokenizer
        """Return an empty text."""
        return ""


class SentencePieceTokenizer:
    """A sentencepiece model as a `Tokenizer`; pickles hold only its arguments, not the model.

    `lower` lower-cases the text before encoding, as in the Cap recipe. Without `punctuation`, that
    of ASCII is deleted, and white space becomes single spaces, as in SigLIP's code (big_vision
    `prompt_engineering.py`, `canonicalize_text`). Raises UserError if the file is missing, is not a
    sentencepiece model, does not pad with id 0 or has no end-of-sentence piece; or if `max_len`
    leaves no room for text.
    """

    pad_id = 0

    def __init__(
        self,
        model_path: str | os.PathLike,
        max_len: int = 64,
        lower: bool = True,
        punctuation: bool = True,
    ):
        if max_len < 2:
            raise UserError(f"tokenizer: max_len is {max_len}; it must be at least 2.")
        self.max_len = max_len
        self._path = os.fspath(model_path)
        self._lower, self._punctuation = lower, punctuation
        self._model = _load(files.place(model_path))
        proto = self._model.serialized_model_proto()
        self.identity = f"{hashlib.sha256(proto).hexdigest()} {max_len} {lower}"
        self.identity += "" if punctuation else " without punctuation"
        self.eos_id = self._model.eos_id()
        self.vocab_size = len(self._model)
        if self._model.pad_id() != self.pad_id or self.eos_id < 0:
            raise UserError(
                f"tokenizer: {self._path} has pad id {self._model.pad_id()} and EOS id "
                f"{self.eos_id}; it needs pad id 0 and an EOS piece (train one with "
                "tools/train_tokenizer.py)."
            )

    def encode(self, text: str) -> np.ndarray:
        """Return int32 [max_len]: pieces, EOS, then 0. Long texts are truncated but keep EOS."""
        text = encodable(text.lower() if self._lower else text)
        if not self._punctuation:
            text = " ".join(text.translate(_WITHOUT_PUNCTUATION).split())
        pieces = self._model.encode(text)[: self.max_len - 1]
        ids = np.zeros(self.max_len, np.int32)
        ids[: len(pieces)] = pieces
        ids[len(pieces)] = self.eos_id
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text up to the first EOS or padding of `ids`, an integer sequence [T]."""
        pieces = []
        for piece in ids:
            if piece in (self.eos_id, self.pad_id):
                break
            pieces.append(int(piece))
        return self._model.decode(pieces)

    def __reduce__(self):
        return SentencePieceTokenizer, (self._path, self.max_len, self._lower, self._punctuation)


def encode_answer(
    tokenizer: TextEncoder, question: str, answer: str | None, limit: int = 0
) -> tuple[np.ndarray, int]:
    """Encode a question, which is given to the model, and the answer that it learns to predict.

    Returns a row, int32 [max_len], and the number of its ids that belong to the question. The row
    holds the question's ids without EOS, truncated to half of the row, the answer's with EOS (kept
    when truncated), and padding. The question "" has no ids, nor has the answer None, not even EOS.
    The answer is also truncated to `limit` ids, EOS included, if that is not 0. If every text
    begins with a start token, as in CLIP, the row has one, which does not count for the limit.
    """
    pad, length = tokenizer.pad_id, tokenizer.max_len
    if not length or not (question or limit):
        return np.zeros(length, np.int32) if answer is None else tokenizer.encode(answer), 0
    starts = int(np.sum(tokenizer.encode("") != pad)) - 1  # besides EOS
    ids = np.zeros(length, np.int32) if answer is None else tokenizer.encode(answer)
    if limit and np.sum(ids != pad) > starts + limit:
        ids[starts + limit - 1], ids[starts + limit :] = tokenizer.eos_id, pad
    if not question:
        return ids, 0
    given = tokenizer.encode(question)
    given = given[: min(np.sum(given != pad) - 1, length // 2)]
    ids = np.concatenate([given, ids[starts:]])[:length]
    if ids[-1] != pad:
        ids[-1] = tokenizer.eos_id
    return ids, len(given)


def train_sentencepiece(
    captions: Iterable[str],
    out_dir: str | os.PathLike,
    vocab_size: int,
    lower: bool = True,
    seed: int = 0,
    punctuation: bool = True,
) -> Path:
    """Train a byte-pair model; write it, `tokenizer.model`, and `tokenizer.json`, its settings.

    We use byte pairs because sentencepiece's unigram trainer only proposes pieces that occur in
    several different words. In a small corpus with few words it therefore spells words out: on
    `scenes`, captions have 19.8 unigram pieces on average but 9.5 byte-pair pieces; on Flickr8k
    with 8000 pieces, 13.9 and 12.2.

    The same captions in the same order, vocabulary size and seed give the same file. Empty captions
    are skipped; of more than a million, `seed` chooses those to train on. With `lower`, they are
    lower-cased, and without `punctuation`, that of ASCII is deleted; encode with the same settings.
    A corpus too small for `vocab_size` pieces gives a smaller vocabulary. Ids: pad 0, EOS 1,
    unknown 2, no BOS.

    Returns the path of the model, which is written atomically. Raises UserError if there are no
    captions, or they have more different characters than `vocab_size`; OSError, with the file's
    name, if a file cannot be written; and any error of `captions`.
    """
    if not 1 <= vocab_size <= MAX_VOCABULARY:
        raise UserError(
            f"tokenizer: vocab_size is {vocab_size}; it must be from 1 to {MAX_VOCABULARY}."
        )
    used = 0
    failure: Exception | None = None

    def sentences() -> Iterator[str]:
        nonlocal used, failure
        try:
            for caption in captions:
                # Without line feeds, which would split the caption in two.
                if sentence := " ".join(_prepared(caption, lower, punctuation).split()):
                    used += 1
                    yield encodable(sentence)
        except Exception as error:  # sentencepiece turns it into a RuntimeError
            failure = error
            raise

    try:
        model = _train_byte_pairs(sentences(), vocab_size, seed)
    except RuntimeError as error:
        if failure:
            raise failure from None
        if not used:
            raise UserError("tokenizer: there are no captions to train it on.") from error
        if "vocab" in str(error).lower() or vocab_size < 3:  # the special pieces
            raise UserError(
                f"tokenizer: vocab_size {vocab_size} is less than the number of different "
                "characters in the captions; increase it."
            ) from error
        raise UserError(
            f"tokenizer: sentencepiece cannot be trained on {used} captions, of which it skips "
            f"those over 4192 bytes ({error})."
        ) from error
    size = len(sentencepiece.SentencePieceProcessor(model_proto=model))
    made = {"captions": used, "lower": lower, "vocab_size": size, "asked": vocab_size, "seed": seed}
    made |= {} if punctuation else {"punctuation": False}
    path = files.place(out_dir) / "tokenizer.model"
    files.write_text(path.with_suffix(".json"), json.dumps(made, indent=2) + "\n")
    files.write_bytes(path, model)
    return path


def _prepared(text: str, lower: bool, punctuation: bool) -> str:
    text = text.lower() if lower else text
    return text if punctuation else text.translate(_WITHOUT_PUNCTUATION)


def _train_byte_pairs(sentences: Iterator[str], vocab_size: int, seed: int) -> bytes:
    """Train a sentencepiece model and return its file."""
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed % 2**32)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=_CHARACTER_COVERAGE,
        input_sentence_size=_TRAIN_CAPTIONS,
        shuffle_input_sentence=True,
        num_threads=1,  # sums over several threads depend on their timing
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def source_captions(
    source: Source, limit: int | None = None, block: int = 0, regions: bool = False
) -> Iterator[str]:
    """Yield questions and captions of a source, or of `limit` examples spread over it.

    With `block`, those are whole blocks of up to so many examples (see `passes.sample`). With
    `regions`, the phrases of regions are among them.
    """
    indices: Iterator[int]
    if limit is None:
        indices = itertools.chain.from_iterable(passes.whole(source))
    else:
        indices = passes.sample(source, limit, block)
    for index in indices:
        example = without_image(source, index)
        if question := example.get("question"):
            yield question
        yield from example["captions"]
        if regions:
            yield from (phrase for phrase, _ in regions_of(source, index, example))


def encodable(text: str) -> str:
    """Return a text with "?" for halves of surrogate pairs, which UTF-8 does not have."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def read_file(path: Path) -> bytes:
    """Return the content of a tokenizer's file; raises UserError if it cannot be read."""
    try:
        with open_regular(path) as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise UserError(
            f"tokenizer: cannot read the file {str(path)!r} ({error.strerror or error}); give the "
            "path of a sentencepiece model or of a file of words, or make one with "
            "tools/train_tokenizer.py."
        ) from error
    if len(data) > MAX_FILE:
        raise UserError(f"tokenizer: {str(path)!r} has over {MAX_FILE} bytes, so it is none.")
    return data


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Read a model file. Raises UserError if it is missing or not valid."""
    data = read_file(path)
    try:
        if not data:  # sentencepiece would leave the model empty
            raise RuntimeError("an empty file")
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise UserError(f"tokenizer: {str(path)!r} is not a sentencepiece model.") from error
