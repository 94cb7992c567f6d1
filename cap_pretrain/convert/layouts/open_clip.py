"""Export of CLIP and SigLIP runs as folders that OpenCLIP loads.

OpenCLIP's own ViT has a class token and no bias in its projection. Its image towers from timm have
every option of ours, so the image tower is one, whose config.json lies in the same folder.
"""

from pathlib import Path
from typing import Any

import numpy as np

from cap_pretrain import learners
from cap_pretrain.convert import fast_tokenizer, openai
from cap_pretrain.convert.encoder import OURS
from cap_pretrain.convert.layouts import timm
from cap_pretrain.convert.layouts.base import (
    BILINEAR,
    Source,
    Written,
    check_encoder,
    mlp_ratio,
    vit_form,
    write_json,
    write_tensors,
)
from cap_pretrain.convert.tables import Entry, to_torch
from cap_pretrain.errors import UserError
from cap_pretrain.learners.dual_encoder import TEXT_OPTIONS, DualEncoder
from cap_pretrain.models.build import text_size
from cap_pretrain.models.mlp import Details

# Of our text tower and the "projection" after it.
TEXT_NAMES: dict[str, Entry] = {
    **{name: own for name, own in openai.TEXT_NAMES.items() if "projection" not in name},
    "projection": "text_projection",
}


def write(folder: Path, source: Source) -> Written:
    """Write a whole dual encoder with its tokenizer; see `layouts.write`."""
    config = source.config
    if config.learner.name != "dual_encoder":
        raise UserError(
            f"--layout=open_clip: the learner is {config.learner.name}, and OpenCLIP holds pairs "
            "of image and text towers (dual_encoder); use timm or transformers."
        )
    if config.learner.head != "linear":
        raise UserError(
            f"--layout=open_clip: the run has learner.head={config.learner.head!r}, and OpenCLIP "
            "projects the pooled vector of an image; use transformers."
        )
    options, usual = learners.options(config), DualEncoder.Options()
    for name in ("bias", *(f"text_{name}" for name in TEXT_OPTIONS)):
        if getattr(options, name) != getattr(usual, name):
            raise UserError(
                f"--layout=open_clip: learner.{name} is {getattr(options, name)!r}, and only text "
                "towers with our defaults can be written in it; use transformers."
            )
    if source.tokenizer is None:
        what = "tokenizer of whole words" if source.byte_pairs is None else "CLIP's byte pairs"
        raise UserError(
            f"--layout=open_clip: the run has {what}, which cannot be written for OpenCLIP; use "
            "timm or transformers."
        )
    form = vit_form(config, "OpenCLIP")
    encoder = source.inside("encoder")
    check_encoder(config, encoder, form)
    write_json(folder / "config.json", timm.model_config(config, form))
    write_json(folder / openai.CONFIG, _config(source))
    write_tensors(folder / openai.WEIGHTS[0], _tensors(source, timm.tensors(encoder, form)))
    tokenizer = fast_tokenizer.files(
        source.tokenizer,
        length=config.text.length,
        lower=config.text.lower,
        punctuation=config.text.punctuation,
    )
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
    where = source.shown_place
    bias = " + model.logit_bias" if "bias" in source.params else ""
    probability = "softmax(-1)" if config.learner.contrast == "softmax" else "sigmoid()"
    return Written(
        library="open_clip",
        usage=(
            "```python\nimport open_clip\nimport torch\n\n"
            f'model, preprocess = open_clip.create_model_from_pretrained("{where}")\n'
            f'tokenizer = open_clip.get_tokenizer("{where}")\n'
            "with torch.no_grad():\n"
            "    images = model.encode_image(preprocess(image)[None], normalize=True)\n"
            "    texts = model.encode_text(tokenizer(captions), normalize=True)\n"
            f"logits = model.logit_scale.exp() * images @ texts.T{bias}\n"
            f"probabilities = logits.{probability}\n```",
            "OpenCLIP interpolates where the run averaged areas, so pixels differ slightly. "
            f"`timm_model_name` in `{openai.CONFIG}` says where this folder lies: change it when "
            "the folder moves.",
        ),
    )


def _config(source: Source) -> dict[str, Any]:
    config, (mean, std) = source.config, OURS
    options = learners.options(config)
    size = options.tower(text_size(config))
    # Details of the text tower, which are the default.
    details = {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": Details.norm_eps}}
    model: dict[str, Any] = {
        "embed_dim": options.embedding or size.width,
        "custom_text": True,
        "vision_cfg": {
            "image_size": config.data.image_size,
            "timm_model_name": source.place,
            "timm_model_pretrained": False,
            "timm_pool": "",  # as in its config.json
            "timm_proj": "linear",
            "timm_proj_bias": True,
        },
        "text_cfg": {
            "context_length": config.text.length,
            "vocab_size": len(source.params["text_tower/embedding/embedding"]),
            "hf_tokenizer_name": source.place.partition(":")[2],
            "tokenizer_kwargs": {"clean": "whitespace"},
            "width": size.width,
            "heads": size.heads,
            "layers": size.depth,
            "mlp_ratio": mlp_ratio(size.width, size.mlp),
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
            **details,
        },
    }
    if "bias" in source.params:
        model["init_logit_bias"] = float(source.params["bias"])
    return {
        "model_cfg": model,
        "preprocess_cfg": {
            "size": config.data.image_size,
            "mode": "RGB",
            "mean": list(mean),
            "std": list(std),
            "interpolation": BILINEAR,
            "resize_mode": "squash" if config.data.crop == "none" else "shortest",
        },
    }


def _tensors(source: Source, image_tower: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    projection = {f"projection/{k}": v for k, v in source.inside("text_projection").items()}
    text = to_torch(source.inside("text_tower") | projection, TEXT_NAMES)
    image_projection = source.inside("image_projection")
    found = {f"visual.trunk.{name}": tensor for name, tensor in image_tower.items()}
    found |= to_torch(
        {f"projection/{k}": v for k, v in image_projection.items()},
        {"projection": "visual.head.proj"},
    )
    found |= {f"text.{name}": tensor for name, tensor in text.items()}
    found["logit_scale"] = np.asarray(source.params["log_scale"], np.float32).reshape(())
    if "bias" in source.params:
        found["logit_bias"] = np.asarray(source.params["bias"], np.float32).reshape(())
    return found
