"""Our models as folders that `transformers` loads: SiglipVisionModel and SiglipModel.

The vision encoder is SigLIP's as it is. A dual encoder is, too, if its images are pooled by the
mean of the tokens: SiglipModel knows no linear projection of the image vector, but its pooling
head, attention of one query to the tokens, can be made to compute just that. With query and key
zero the attention is the mean, the value is the identity, the output projection is ours, and the
MLP that follows adds zero. After a `map` head, whose last step is such an MLP with a residual
connection, there is no place for the projection: those leave as a vision encoder alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain.convert import fast_tokenizer, siglip
from cap_pretrain.convert.encoder import OURS, Form
from cap_pretrain.convert.huggingface import ACTIVATIONS
from cap_pretrain.convert.tables import to_torch
from cap_pretrain.errors import UserError
from cap_pretrain.models.build import encoder_options, encoder_size
from cap_pretrain.models.layers import Details
from cap_pretrain.models.sizes import CONVNETS, parse_name

Params = Mapping[str, np.ndarray]  # by path

_HIDDEN_ACTS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
_BILINEAR = 2  # of PIL, as the image processors of transformers have it in their files


def form(config: ConfigDict) -> Form:
    """The form of a config's encoder.

    Raises:
      UserError: it is no SigLIP.
    """
    if config.model.name in CONVNETS:
        raise UserError(
            f"model.name: {config.model.name} is no SiglipVisionModel, and cannot be exported; its "
            "workdir can be used as it is, as --config.encoder."
        )
    if config.model.colours != "rgb":
        raise UserError(
            f"model.colours: the encoder sees {config.model.colours} alone, which image processors "
            "of transformers do not make, so it cannot be exported; its workdir can be used as it "
            "is, as --config.encoder."
        )
    options = encoder_options(config)
    if options.class_token or options.pre_norm or options.final_norm != "tokens":
        raise UserError(
            "model: an encoder with a class token, a norm before its blocks or without one after "
            "them (as that of a CLIP) is no SiglipVisionModel, and cannot be exported."
        )
    _, patch = parse_name(config.model.name)
    return Form(encoder_size(config), patch, config.data.image_size, options)


def write_vision_model(folder: Path, config: ConfigDict, encoder: Params) -> None:
    """Writes the files of a SiglipVisionModel: weights, config.json, preprocessor_config.json.

    Args:
      folder: where to.
      config: of the run.
      encoder: parameters of the encoder by path.

    Raises:
      UserError: the encoder is no SigLIP, or is not the one that the config describes.
    """
    shapes = form(config).shapes()
    if {path: array.shape for path, array in encoder.items()} != shapes:
        raise UserError(
            "model: the encoder in the checkpoint is not the one that config.json describes; only "
            "ViTs can be exported."
        )
    architecture = {"architectures": ["SiglipVisionModel"], **vision_config(config)}
    _write(folder, config, architecture, _vision_tensors(encoder))


def why_not_whole(config: ConfigDict) -> str:
    """Why a config's learner is not expressed by a SiglipModel; "" if it is."""
    if config.learner.name != "dual_encoder":
        return (
            f"of the learner {config.learner.name}, transformers has a counterpart for the encoder "
            "alone; the rest stays in the checkpoint"
        )
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
    """Writes the files of a SiglipModel: as for the vision model, and those of the tokenizer.

    CLIP's softmax loss is one of logits, too: its bias is zero.

    Args:
      folder: where to.
      config: of the run, of which `why_not_whole` says nothing.
      params: parameters of the `DualEncoder` by path.
      tokenizer_model: the run's sentencepiece model.
    """

    def inside(module: str) -> dict[str, np.ndarray]:
        prefix = module + "/"
        return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix)}

    size = encoder_size(config)
    projection = inside("text_projection")
    text = inside("text_tower") | {f"projection/{k}": v for k, v in projection.items()}
    vision = inside("encoder") | mean_head(size.width, size.mlp, inside("image_projection"))
    tensors = _vision_tensors(vision)
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


def vision_config(config: ConfigDict) -> dict[str, Any]:
    """The config of a SiglipVisionModel; raises UserError as `form`."""
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
    """What is done to an image before it comes to the encoder, as our evaluation does it.

    transformers interpolates where we average areas, so pixels differ a little.
    """
    side, (mean, std) = config.data.image_size, OURS
    square = {"height": side, "width": side}
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
    """Parameters of a pooling head that computes `projection` of the mean of its tokens.

    Args:
      width: of the tokens.
      mlp: hidden units of the head's MLP.
      projection: kernel [width, width] and bias.
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
    # transformers before version 5 needs the prefix even where the vision model stands alone.
    prefix = siglip.FAMILY.prefix
    return {prefix + name: tensor for name, tensor in to_torch(encoder, siglip.NAMES).items()}


def _write(
    folder: Path,
    config: ConfigDict,
    architecture: dict[str, Any],
    tensors: dict[str, np.ndarray],
    **preprocessing: Any,
) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    # transformers refuses weights that do not say this.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    preprocessing = preprocessor_config(config) | preprocessing
    for name, content in (
        ("config.json", architecture),
        ("preprocessor_config.json", preprocessing),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
