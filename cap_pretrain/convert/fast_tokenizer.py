"""Export of a sentencepiece model as `tokenizer.json` of Hugging Face tokenizers.

SiglipTokenizer of `transformers` removes punctuation, as SigLIP's training did and ours does not.
These files give the ids of `SentencePieceTokenizer`, except that the name of a special piece in a
text, such as "</s>", becomes that piece, and sigmas that end Greek words are lower-cased otherwise.
"""

import base64
import json
from typing import Any

from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import parsing


def files(model: bytes, *, length: int, lower: bool, punctuation: bool = True) -> dict[str, bytes]:
    """Return the content of a tokenizer's two JSON files and of its model, by file name.

    `length` is the maximum number of ids per text. Raises UserError if the sentencepiece model is
    not of type BPE or unigram, or splits text in a way that `tokenizers` lacks.
    """
    proto = _parse(model)
    content = {
        "tokenizer.json": _tokenizer(proto, lower, punctuation),
        "tokenizer_config.json": _config(proto.trainer_spec, length),
    }
    texts = {k: json.dumps(v, ensure_ascii=False, indent=1) + "\n" for k, v in content.items()}
    return {k: text.encode() for k, text in texts.items()} | {"tokenizer.model": model}


def special_ids(model: bytes) -> dict[str, int | None]:
    """Return the ids of special pieces under their names in a config.json of transformers."""
    trained = _parse(model).trainer_spec
    return {"pad_token_id": trained.pad_id, "eos_token_id": trained.eos_id, "bos_token_id": None}


def _parse(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    # Protobuf adds the messages of a module at run time.
    with parsing("tokenizer"):
        return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]


def _tokenizer(proto: Any, lower: bool, punctuation: bool) -> dict[str, Any]:
    trained, normalizer = proto.trainer_spec, proto.normalizer_spec
    if (
        trained.model_type not in (trained.BPE, trained.UNIGRAM)
        or trained.treat_whitespace_as_suffix
    ):
        raise UserError(
            "tokenizer: only sentencepiece models of type BPE or unigram, with the space before "
            "the word, can be written for transformers."
        )
    special = [
        {"id": n, "content": piece.piece, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for n, piece in enumerate(proto.pieces)
        if piece.type in (piece.CONTROL, piece.UNKNOWN)
    ]
    space = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "always" if normalizer.add_dummy_prefix else "never",
        "split": trained.split_by_whitespace,
    }
    steps = _normalizers(normalizer, lower, punctuation)
    eos = trained.eos_piece
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [text, end],
            "pair": [text, second, end],
            "special_tokens": {eos: {"id": eos, "ids": [trained.eos_id], "tokens": [eos]}},
        },
        "decoder": space,
        "model": _unigram(proto) if trained.model_type == trained.UNIGRAM else _bpe(proto),
    }


def _config(trained: Any, length: int) -> dict[str, Any]:
    """Return `tokenizer_config.json`; padding is not masked, since text towers attend to it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "model_input_names": ["input_ids"],
        "padding_side": "right",
        "pad_token": trained.pad_piece,
        "eos_token": trained.eos_piece,
        "unk_token": trained.unk_piece,
        "clean_up_tokenization_spaces": False,
    }


DELETES_PUNCTUATION = {"type": "Replace", "pattern": {"Regex": r"[!-/:-@\[-`{-~]"}, "content": ""}
"""The step that deletes the punctuation of ASCII, `string.punctuation`."""


def _normalizers(spec: Any, lower: bool, punctuation: bool) -> list[dict[str, Any]]:
    """Return the normalization of texts, in the order of `SentencePieceTokenizer`."""
    steps: list[dict[str, Any]] = [{"type": "Lowercase"}] if lower else []
    if not punctuation:
        steps += [
            DELETES_PUNCTUATION,
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Strip", "strip_left": True, "strip_right": True},
        ]
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return steps


def _unigram(proto: Any) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": proto.trainer_spec.unk_id,
        "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _bpe(proto: Any) -> dict[str, Any]:
    ids = {piece.piece: n for n, piece in enumerate(proto.pieces)}
    merges = [  # sentencepiece merges whichever pair makes the piece with the best score
        (piece[:cut], piece[cut:])
        for piece in sorted(ids, key=lambda piece: -proto.pieces[ids[piece]].score)
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    return {
        "type": "BPE",
        "unk_token": proto.trainer_spec.unk_piece,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "vocab": ids,
        "merges": merges,
    }
