"""Export of our models as folders that `transformers` loads: SiglipVisionModel and SiglipModel.

Our vision encoder is the same as SigLIP's. SiglipModel lacks our linear projection of the image
vector, but with `pool=gap` (the mean) its pooling head can express it: with query and key zero its
attention is the mean, the value is the identity, the output projection is ours, and the MLP adds
zero. A `map` head ends in such an MLP, so with it only the vision encoder is exported. A learner
with `head=map` has no projection after its own attention pooling, which is that of SigLIP.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain.convert import fast_tokenizer, siglip
from cap_pretrain.convert.encoder import OURS, Form
from cap_pretrain.convert.huggingface import ACTIVATIONS
from cap_pretrain.convert.layouts.base import (
    Params,
    check_encoder,
    vit_form,
    write_json,
    write_tensors,
)
from cap_pretrain.convert.tables import to_torch
from cap_pretrain.errors import UserError
from cap_pretrain.models.build import encoder_size
from cap_pretrain.models.layers import Details
from cap_pretrain.models.sizes import Size

_HIDDEN_ACTS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
_BILINEAR = 2  # of PIL, as in the files of image processors


def form(config: ConfigDict) -> Form:
    """Return the architecture of an encoder; raises UserError if SigLIP cannot express it."""
    made = vit_form(config, "transformers", "is not a SiglipVisionModel, and cannot be exported")
    options = made.options
    if options.class_token or options.pre_norm or options.final_norm != "tokens":
        raise UserError(
            "model: an encoder with a class token, with a norm before its blocks or without one "
            "after them (as in CLIP) is not a SiglipVisionModel, and cannot be exported."
        )
    return made


def write_vision_model(folder: Path, config: ConfigDict, encoder: Params) -> None:
    """Write weights, config.json and preprocessor_config.json of a SiglipVisionModel.

    Raises UserError if it cannot express the encoder, or if `config` describes another one.
    """
    check_encoder(config, encoder, form(config))
    architecture = {"architectures": ["SiglipVisionModel"], **vision_config(config)}
    _write(folder, config, architecture, _vision_tensors(encoder))


def why_not_whole(config: ConfigDict) -> str:
    """Return why a config's learner cannot be expressed as a SiglipModel; "" if it can."""
    if config.learner.name != "dual_encoder":
        return (
            f"the parts of the learner {config.learner.name} other than the encoder, which have no "
            "counterpart in transformers; they stay in the checkpoint"
        )
    if config.learner.head == "map":
        return ""
    if config.model.pool != "gap":
        return (
            f"the projection of a vector pooled by model.pool={config.model.pool} cannot be "
            "expressed by SiglipModel (with gap it can); projections and text tower stay in the "
            "checkpoint"
        )
    return ""


def write_dual_encoder(
    folder: Path, config: ConfigDict, params: Params, tokenizer_model: bytes
) -> None:
    """Write the files of a SiglipModel and its tokenizer, given a sentencepiece model.

    `why_not_whole` must return "". CLIP's softmax loss has no bias of the logits; zero is written.
    """

    def inside(module: str) -> dict[str, np.ndarray]:
        prefix = module + "/"
        return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}

    size = encoder_size(config)
    projection = inside("text_projection")
    text = inside("text_tower") | {f"projection/{k}": v for k, v in projection.items()}
    tensors = _vision_tensors(_with_head(inside("encoder"), size, config.learner.head, inside))
    tensors |= {f"text_model.{k}": v for k, v in to_torch(text, siglip.TEXT_NAMES).items()}
    tensors["logit_scale"] = np.reshape(params["log_scale"], 1)
    tensors["logit_bias"] = np.reshape(params.get("bias", np.float32(0)), 1)

    architecture = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {
            "model_type": "siglip_text_model",
            **_sizes(config),
            "vocab_size": len(text["embedding/embedding"]),
            "max_position_embeddings": config.text.length,
            "hidden_act": _HIDDEN_ACTS[Details.activation],
            "layer_norm_eps": Details.norm_eps,
            "projection_size": len(text["projection/bias"]),
            **fast_tokenizer.special_ids(tokenizer_model),
        },
        "vision_config": vision_config(config) | {"vision_use_head": True},
    }
    _write(folder, config, architecture, tensors, processor_class="SiglipProcessor")
    for name, content in fast_tokenizer.files(
        tokenizer_model, length=config.text.length, lower=config.text.lower
    ).items():
        (folder / name).write_bytes(content)


def _with_head(
    encoder: Params, size: Size, head: str, inside: Callable[[str], Params]
) -> dict[str, np.ndarray]:
    """Return the parameters of an encoder with the pooling head that makes vectors of images."""
    plain = {path: array for path, array in encoder.items() if not path.startswith("head/")}
    if head == "map":
        own = inside("image_pooling")
        return plain | {f"head/{path}": array for path, array in own.items()}
    projection = inside("image_projection")
    if head == "none":
        width = size.width
        projection = {
            "kernel": np.eye(width, dtype=np.float32),
            "bias": np.zeros(width, np.float32),
        }
    return plain | mean_head(size.width, size.mlp, projection)


def vision_config(config: ConfigDict) -> dict[str, Any]:
    """Return the config of a SiglipVisionModel; raises UserError like `form`."""
    made = form(config)
    return {
        "model_type": "siglip_vision_model",
        **_sizes(config),
        "image_size": made.image_size,
        "patch_size": made.patch,
        "num_channels": 3,
        "hidden_act": _HIDDEN_ACTS[made.options.activation],
        "layer_norm_eps": made.options.norm_eps,
        "vision_use_head": made.options.pool == "map",
    }


def preprocessor_config(config: ConfigDict) -> dict[str, Any]:
    """Return preprocessing as in our evaluation, but interpolating, not averaging areas."""
    side, (mean, std) = config.data.image_size, OURS
    square = {"height": side, "width": side}
    geometry: dict[str, Any]
    if config.data.crop == "none":
        geometry = {"image_processor_type": "SiglipImageProcessor", "size": square}
    else:  # the central square
        geometry = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": side},
            "do_center_crop": True,
            "crop_size": square,
        }
    return {
        **geometry,
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def mean_head(width: int, mlp: int, projection: Params) -> dict[str, np.ndarray]:
    """Return parameters of a pooling head that computes `projection` of the mean of its tokens.

    Tokens have `width` dimensions, and the kernel of `projection` is [width, width].
    """

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    linear = {"kernel": zeros(width, width), "bias": zeros(width)}
    modules = {
        "attention/query": linear,
        "attention/key": linear,
        "attention/value": linear | {"kernel": np.eye(width, dtype=np.float32)},
        "attention/out": projection,
        "norm": {"scale": np.ones(width, np.float32), "bias": zeros(width)},
        "mlp/up": {"kernel": zeros(width, mlp), "bias": zeros(mlp)},
        "mlp/down": {"kernel": zeros(mlp, width), "bias": zeros(width)},
    }
    params = {
        f"head/{m}/{leaf}": array for m, part in modules.items() for leaf, array in part.items()
    }
    return params | {"head/probe": zeros(1, width)}


def _sizes(config: ConfigDict) -> dict[str, int]:
    size = encoder_size(config)
    return {
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "intermediate_size": size.mlp,
        "num_attention_heads": size.heads,
    }


def _vision_tensors(encoder: Params) -> dict[str, np.ndarray]:
    prefix = siglip.FAMILY.prefix  # which transformers 4 needs even for a vision model alone
    return {prefix + name: tensor for name, tensor in to_torch(encoder, siglip.NAMES).items()}


def _write(
    folder: Path,
    config: ConfigDict,
    architecture: dict[str, Any],
    tensors: dict[str, np.ndarray],
    **preprocessing: Any,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", architecture)
    write_json(folder / "preprocessor_config.json", preprocessor_config(config) | preprocessing)
