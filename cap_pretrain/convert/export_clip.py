"""Export of CLIPs, such as fine-tuned ones, for `transformers`: CLIPVisionModel and CLIPModel."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain.convert import clip, export
from cap_pretrain.convert.encoder import Form
from cap_pretrain.convert.layouts.base import Params, Source, check_encoder, vit_form
from cap_pretrain.convert.tables import Entry, to_torch
from cap_pretrain.learners.dual_encoder import DualEncoder
from cap_pretrain.naflex import SQUARE

_VISION: dict[str, Entry] = clip.NAMES | {
    "positions": "embeddings.position_embedding.weight",
    "class_token": "embeddings.class_embedding",
}


def is_clip(config: ConfigDict) -> bool:
    """Return whether the encoder of a config is the ViT of CLIP, whatever its size."""
    is_square = config.data.layout == SQUARE  # otherwise `export.form` says what is wrong
    return is_square and clip.is_vision(vit_form(config, "transformers", export.NO_VIT).options)


def write_vision_model(folder: Path, config: ConfigDict, encoder: Params) -> None:
    """Write weights, config.json and preprocessor_config.json of a CLIPVisionModel.

    Raises UserError if `config` describes another encoder.
    """
    form = vit_form(config, "transformers", export.NO_VIT)
    check_encoder(config, encoder, form)
    architecture = {"architectures": ["CLIPVisionModel"], **_vision_config(form)}
    export.write_model(folder, config, architecture, _vision_tensors(encoder))


def why_not_whole(options: DualEncoder.Options) -> str:
    """Return why such a dual encoder with CLIP's images is not a CLIPModel; "" if it is one."""
    for name, value in clip.LEARNER.items():
        if getattr(options, name) != value:
            return (
                f"the text tower and projections, since learner.{name} is "
                f"{getattr(options, name)!r}, and {value!r} in a CLIPModel"
            )
    return ""


def write_dual_encoder(folder: Path, source: Source) -> None:
    """Write the files of a CLIPModel and its tokenizer; `why_not_whole` must return ""."""
    config, form = source.config, vit_form(source.config, "transformers")
    text, special = export.text_config(source)
    theirs = source.inside("text_tower") | {
        f"{name}/{leaf}": array
        for name in ("text_projection", "image_projection")
        for leaf, array in source.inside(name).items()
    }
    tensors = {
        name if "projection" in name else f"text_model.{name}": tensor
        for name, tensor in to_torch(
            export.without_padding(theirs, source), clip.TEXT_NAMES
        ).items()
    }
    tensors |= _vision_tensors(source.inside("encoder"))
    tensors["logit_scale"] = np.asarray(source.params["log_scale"], np.float32).reshape(())
    width = len(tensors["text_projection.weight"])
    architecture = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": width,
        "text_config": {
            "model_type": "clip_text_model",
            "projection_dim": width,
            **text,
            **special,
        },
        "vision_config": _vision_config(form) | {"projection_dim": width},
    }
    export.write_model(folder, config, architecture, tensors, processor_class="CLIPProcessor")
    export.write_tokenizer(folder, source)


def _vision_config(form: Form) -> dict[str, Any]:
    return {"model_type": "clip_vision_model", **export.vision_fields(form)}


def _vision_tensors(encoder: Params) -> dict[str, np.ndarray]:
    """Return the tensors of a vision model.

    It has no bias in the patch embedding, and positions are added right after it, so the bias moves
    into them. The class token has a position, too, which is zero.
    """
    params = dict(encoder)
    bias = params.pop("patch_embedding/bias")
    params["positions"] = np.concatenate([np.zeros_like(bias)[None], params["positions"] + bias])
    params["class_token"] = params["class_token"][0]
    return {f"vision_model.{name}": t for name, t in to_torch(params, _VISION).items()}
