"""Import of whole dual encoders: CLIPModel and SiglipModel of `transformers`, and OpenCLIP's."""

from pathlib import Path
from typing import Any

from cap_pretrain.convert import clip, huggingface, openai, siglip, towers
from cap_pretrain.convert.encoder import Pretrained
from cap_pretrain.convert.towers import Text, Tower, Whole
from cap_pretrain.convert.weights import open_folder, read_json
from cap_pretrain.untrusted import bounded, checked, entry

DEFAULTS: dict[str, dict[str, Any]] = {  # of transformers, for fields that text_config may omit
    "clip": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    "siglip": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
DEFAULTS["siglip2"] = DEFAULTS["siglip"]


def read(folder: Path, encoder: Pretrained) -> tuple[Whole | None, str]:
    """Read what a folder holds besides the image encoder.

    Args:
        folder: One that `convert.open_encoder` reads.
        encoder: What it returned.

    Returns:
        The rest, or None if there is only an encoder; and, for people, why a text tower that is
        there cannot be used, or "".

    Raises:
        UserError: The files of the text tower are damaged or do not fit.
    """
    where = folder / huggingface.CONFIG
    if where.is_file():
        kind = read_json(where).get("model_type")
        if kind in DEFAULTS:
            return _transformers(folder, str(kind), encoder)
        if kind == "aimv2":
            return None, (
                f"{folder}: its text tower is left out, since ours has no RMSNorm and no gated "
                "MLPs; the image encoder is read"
            )
    if (folder / openai.CONFIG).is_file():
        return openai.read_whole(folder, _width(encoder))
    if encoder.text:
        return None, (
            f"{folder}: its text tower is left out, as weights alone do not say how texts are "
            "encoded; give a folder of OpenCLIP or transformers with the model's tokenizer"
        )
    return None, ""


def _width(encoder: Pretrained) -> int:
    return len(encoder.params["norm"]["scale"])


def _transformers(folder: Path, kind: str, encoder: Pretrained) -> tuple[Whole | None, str]:
    where = folder / huggingface.CONFIG
    config, family = read_json(where), clip if kind == "clip" else siglip
    section = DEFAULTS[kind]
    for name in ("text_config", "text_config_dict"):  # the second of old CLIP configs
        section = section | checked(config.get(name) or {}, name, dict, where)
    length = bounded(
        entry(section, "max_position_embeddings", int, where),
        *("max_position_embeddings", 3, towers.MAX_LENGTH, where),
    )
    text = _text(folder, kind, length)
    if text is None:
        needs = towers.needed()
        if kind == "clip":
            needs = f"{towers.BYTE_PAIRS[0]}, or {towers.BYTE_PAIRS[1]} with vocab.json"
        return None, f"{folder}: its text tower is left out, as it has no tokenizer ({needs})"
    activation, eps = huggingface.details(section, where)
    weights = open_folder(folder, *huggingface.WEIGHTS).without("text_model.")
    embedding, _ = weights.shape(f"{family.TEXT_NAMES['text_projection']}.weight", 2)
    tower = Tower(
        options={**family.LEARNER, "text_activation": activation, "text_norm_eps": eps},
        size=huggingface.size(section, where),
        names=family.TEXT_NAMES,
        ignored=("vision_model.", "logit_scale", "logit_bias", "embeddings.position_ids"),
        widths=(_width(encoder), embedding),
    )
    return towers.read(folder, weights, tower, text), ""


def _text(folder: Path, kind: str, length: int) -> Text | None:
    """Return how texts are encoded for a model of transformers; None without a tokenizer."""
    if kind in ("siglip", "siglip2"):
        return towers.pieces(folder, length)
    file = towers.named(folder, towers.BYTE_PAIRS)
    return Text(file, length) if file else None
