"""Reading the text tower, projections and tokenizer of a dual encoder from elsewhere."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from cap_pretrain import rules
from cap_pretrain.convert import fast_tokenizer
from cap_pretrain.convert.encoder import MAX_DEPTH, MAX_HEADS, MAX_MLP, MAX_WIDTH
from cap_pretrain.convert.tables import Table, to_ours
from cap_pretrain.convert.weights import Weights, read_json
from cap_pretrain.data.text import byte_pairs
from cap_pretrain.data.text.byte_pairs import BytePairTokenizer
from cap_pretrain.data.text.tokenizers import MAX_FILE, SentencePieceTokenizer
from cap_pretrain.errors import UserError
from cap_pretrain.learners.dual_encoder import DualEncoder
from cap_pretrain.models.layers import Compute
from cap_pretrain.models.sizes import Size
from cap_pretrain.models.text_tower import TextTower
from cap_pretrain.untrusted import bounded, checked

BYTE_PAIRS = (byte_pairs.JSON, byte_pairs.MERGES, "bpe_simple_vocab_16e6.txt.gz")
PIECES = ("spiece.model", "tokenizer.model")
"""Names of the files of tokenizers: of CLIP's, and of SigLIP's and ours."""

MAX_LENGTH = 2**12
"""Largest number of tokens of a text that a folder can ask for."""

MAX_TOKENS = 2**24
"""Largest vocabulary of a text tower."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """A dual encoder imported from elsewhere, besides its image encoder.

    Attributes:
        learner: Options of the learner dual_encoder.
        text: Fields of `config.text`; `tokenizer` is the name of a file in the folder.
        params: Parameters by path in the learner, without those of the encoder.
    """

    learner: dict[str, Any]
    text: dict[str, Any]
    params: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Text:
    """How a folder encodes texts.

    Attributes:
        file: Name of the tokenizer's file.
        length: Number of positions of the text tower.
        lower: Whether texts are lower-cased, if the tokenizer does not say so itself.
        punctuation: Whether punctuation is kept, likewise.
        pads_with_eos: Whether texts are padded with EOS, and not with id 0.
    """

    file: str
    length: int
    lower: bool = True
    punctuation: bool = True
    pads_with_eos: bool = True

    def fields(self) -> dict[str, Any]:
        """Return the fields of `config.text`."""
        names = ("length", "lower", "punctuation")
        return {"tokenizer": self.file} | {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class Tower:
    """Where a text tower and the projections are.

    Attributes:
        options: Of the learner; `embedding` and the tower's size are those of the weights.
        size: Size of the text tower.
        names: Parameters of the tower by their path in it, and the modules `text_projection` and
            `image_projection`, if there are any.
        ignored: Prefixes of the names of tensors of other parts.
        widths: Widths of the image encoder and of the embeddings.
    """

    options: dict[str, Any]
    size: Size
    names: Table
    ignored: Iterable[str]
    widths: tuple[int, int]


def read(folder: Path, weights: Weights, tower: Tower, text: Text) -> Whole:
    """Read a text tower and the projections; raise UserError if they or the tokenizer do not fit.

    `weights` are those of the folder, with the names that `tower` gives.
    """
    _check(tower, folder)
    sizes = {f"text_{name}": n for name, n in dataclasses.asdict(tower.size).items()}
    made = DualEncoder.Options(**tower.options, **sizes)
    if made.head == "linear":
        made = dataclasses.replace(made, embedding=tower.widths[1])
    elif len(set(tower.widths)) > 1:
        raise UserError(
            f"{folder}: its image vectors have {tower.widths[0]} dimensions, and those of texts "
            f"{tower.widths[1]}."
        )
    tokens = str(tower.names["embedding/embedding"])
    count = bounded(weights.shape(tokens, 2)[0], "number of tokens", 1, MAX_TOKENS, folder)
    params = {
        name if name.startswith(_PROJECTIONS) else f"text_tower/{name}": array
        for name, array in to_ours(
            weights, tower.names, _shapes(tower, made, count, text.length), tower.ignored
        ).items()
    }
    params["text_tower/embedding/embedding"] = _embeddings(
        params["text_tower/embedding/embedding"], folder, text
    )
    params["log_scale"] = _scalar(weights, "logit_scale")
    if made.contrast == "sigmoid":
        params["bias"] = _scalar(weights, "logit_bias")
    return Whole(dataclasses.asdict(made), text.fields(), params)


_PROJECTIONS = ("text_projection/", "image_projection/")


def _check(tower: Tower, folder: Path) -> None:
    """Raise UserError if the numbers are not those of a text tower, or larger than the limits."""
    size = tower.size
    for value, name, most in (
        (size.width, "width of the text tower", MAX_WIDTH),
        (size.depth, "depth of the text tower", MAX_DEPTH),
        (size.mlp, "width of its MLP", MAX_MLP),
        (size.heads, "number of its heads", MAX_HEADS),
        (tower.widths[1], "width of the embeddings", MAX_WIDTH),
    ):
        bounded(value, name, 1, most, folder)
    if size.width % size.heads:
        raise UserError(
            f"{folder}: {size.heads} attention heads do not divide the width {size.width} of the "
            "text tower."
        )


def _shapes(
    tower: Tower, options: DualEncoder.Options, tokens: int, length: int
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tower's parameters by path in it, and of the projections."""

    def build() -> TextTower:
        return TextTower(
            tower.size,
            vocab_size=tokens,
            length=length,
            options=options.text(),
            compute=Compute(),
            rngs=nnx.Rngs(0),
        )

    state = nnx.state(nnx.eval_shape(build), nnx.Param)
    shapes = {k: v.shape for k, v in rules.flatten(nnx.to_pure_dict(state)).items()}
    of_images, width = tower.widths
    projected = {"text_projection": tower.size.width}
    projected |= {"image_projection": of_images} if options.head == "linear" else {}
    for name, own in projected.items():
        shapes |= {f"{name}/kernel": (own, width)}
        shapes |= {f"{name}/bias": (width,)} if options.bias else {}
    return shapes


def _scalar(weights: Weights, name: str) -> np.ndarray:
    if math.prod(weights.shape(name)) != 1:
        raise UserError(f"{weights.where}: {name} must be one number.")
    return weights.take(name).reshape(())


def _embeddings(theirs: np.ndarray, folder: Path, text: Text) -> np.ndarray:
    """Return the embeddings of our ids, given those of the folder's, [tokens, width].

    Our padding has an id for itself, 0, and gets the vector of what the folder's texts are padded
    with. Byte pairs have the next ids, so CLIP's "!", which is 0 there, is 1 here. Vectors beyond
    the last token of the tokenizer are dropped.
    """
    path = folder / text.file
    tokenizer: BytePairTokenizer | SentencePieceTokenizer
    if byte_pairs.is_byte_pairs_file(path):
        tokenizer, shift = BytePairTokenizer(path, max(text.length, 3)), 1
    else:
        tokenizer, shift = SentencePieceTokenizer(path, max(text.length, 2)), 0
    needed = tokenizer.vocab_size - shift
    if len(theirs) < needed:
        raise UserError(
            f"{path}: has {needed} tokens, but the text tower has embeddings of {len(theirs)}; put "
            "the model's own tokenizer there."
        )
    pad = theirs[tokenizer.eos_id - shift if text.pads_with_eos else 0]
    return np.concatenate([pad[None], theirs[1 - shift : needed]])


def needed() -> str:
    """Return what `pieces` needs in a folder, for people."""
    return f"{' or '.join(PIECES)} with {SETTINGS}, which names its class"


def named(folder: Path, names: Iterable[str]) -> str:
    """Return the first of the names of files that the folder has; "" if it has none."""
    return next((name for name in names if (folder / name).is_file()), "")


def pieces(folder: Path, length: int) -> Text | None:
    """Return how a folder with a sentencepiece model encodes texts; None if it does not say that.

    By the class in SETTINGS: SigLIP's tokenizer deletes punctuation, that of SigLIP 2 only
    lower-cases, and tokenizer.json of an export of ours says what it does.
    """
    file, where = named(folder, PIECES), folder / SETTINGS
    settings = read_json(where) if file and where.is_file() else {}
    kind = settings.get("tokenizer_class")
    if not kind:
        return None
    pad = settings.get("pad_token", "</s>")
    if isinstance(pad, dict):
        pad = pad.get("content")
    lower, punctuation = True, True
    if kind == "SiglipTokenizer":
        punctuation = False
        lower = checked(settings.get("do_lower_case", True), "do_lower_case", bool, where)
    elif kind == OURS:
        steps = _normalizers(folder)
        lower = {"type": "Lowercase"} in steps
        punctuation = fast_tokenizer.DELETES_PUNCTUATION not in steps
    return Text(file, length, lower, punctuation, pads_with_eos=pad != "<pad>")


SETTINGS = "tokenizer_config.json"

OURS = "PreTrainedTokenizerFast"
"""The class of the tokenizers that we export."""


def _normalizers(folder: Path) -> list[Any]:
    where = folder / byte_pairs.JSON
    tokenizer = read_json(where, MAX_FILE)  # it lists the vocabulary
    normalizer = checked(tokenizer.get("normalizer") or {}, "normalizer", dict, where)
    return checked(normalizer.get("normalizers") or [], "normalizers", list, where)
