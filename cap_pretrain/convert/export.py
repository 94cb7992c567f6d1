"""Export of our models as folders that `transformers` loads: SiglipVisionModel and SiglipModel.

Models for images in their own aspect ratio become Siglip2VisionModel and Siglip2Model, which differ
in the patch embedding and the preprocessing. `convert.export_clip` writes those that are
CLIP's instead.

Our vision encoder is the same as SigLIP's. SiglipModel lacks our linear projection of the image
vector, but with `pool=gap` (the mean) its pooling head can express it: with query and key zero its
attention is the mean, the value is the identity, the output projection is ours, and the MLP adds
zero. A `map` head ends in such an MLP, so with it only the vision encoder is exported. A learner
with `head=map` has no projection after its own attention pooling, which is that of SigLIP.
"""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.convert import fast_tokenizer, siglip, siglip2
from cap_pretrain.convert.encoder import OURS, Form
from cap_pretrain.convert.huggingface import ACTIVATIONS
from cap_pretrain.convert.layouts.base import (
    Params,
    Source,
    check_encoder,
    vit_form,
    write_json,
    write_tensors,
)
from cap_pretrain.convert.tables import to_torch
from cap_pretrain.data.text import byte_pairs
from cap_pretrain.errors import UserError
from cap_pretrain.models.build import encoder_size, patch_of, text_size
from cap_pretrain.models.sizes import Size
from cap_pretrain.naflex import NAFLEX, SQUARE

_HIDDEN_ACTS = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
NO_VIT = "is not a SiglipVisionModel, and cannot be exported"
_BILINEAR = 2  # of PIL, as in the files of image processors


def form(config: ConfigDict) -> Form:
    """Return the architecture of an encoder; raises UserError if SigLIP cannot express it."""
    made = vit_form(config, "transformers", NO_VIT)
    options = made.options
    if options.class_token or options.pre_norm or options.final_norm != "tokens":
        raise UserError(
            "model: an encoder with some of a class token, pooling by it, a norm before its blocks "
            "and the last norm after pooling is not a SiglipVisionModel, and cannot be exported; "
            "with all of them it is a CLIPVisionModel."
        )
    return made


def write_vision_model(folder: Path, config: ConfigDict, encoder: Params) -> None:
    """Write weights, config.json and preprocessor_config.json of a SiglipVisionModel.

    Raises UserError if it cannot express the encoder, or if `config` describes another one.
    """
    check_encoder(config, encoder, form(config))
    architecture = {"architectures": [f"{name(config)}VisionModel"], **vision_config(config)}
    write_model(folder, config, architecture, _vision_tensors(config, encoder))


def name(config: ConfigDict) -> str:
    """Return how the names of the classes of a config's models begin."""
    return "Siglip" if config.data.layout == SQUARE else "Siglip2"


def why_not_whole(config: ConfigDict) -> str:
    """Return why a config's learner cannot be expressed as a SiglipModel; "" if it can."""
    if config.learner.name != "dual_encoder":
        return (
            f"the parts of the learner {config.learner.name} other than the encoder, which have no "
            "counterpart in transformers; they stay in the checkpoint"
        )
    options = learners.options(config)
    for name, needed in siglip.TEXT.items():
        if (found := getattr(options, name)) != needed:
            return (
                f"the text tower and projections, since learner.{name} is {found!r}, and "
                f"{needed!r} in a SiglipModel"
            )
    if options.head == "map":
        return ""
    if options.head == "linear" and config.model.pool != "gap":
        return (
            f"the projection of a vector pooled by model.pool={config.model.pool} cannot be "
            "expressed by SiglipModel (with gap it can); projections and text tower stay in the "
            "checkpoint"
        )
    width = options.embedding or options.tower(text_size(config)).width
    if options.head == "linear" and width != encoder_size(config).width:
        return (
            f"the text tower and projections, since the embeddings have {width} dimensions and "
            f"the image tower {encoder_size(config).width}; in a SiglipModel these are equal"
        )
    return ""


def write_dual_encoder(folder: Path, source: Source) -> None:
    """Write the files of a SiglipModel and its tokenizer.

    `why_not_whole` must return "". CLIP's softmax loss has no bias of the logits; zero is written.
    """
    config, params = source.config, source.params
    size = encoder_size(config)
    projection = source.inside("text_projection")
    text = source.inside("text_tower") | {f"text_projection/{k}": v for k, v in projection.items()}
    tensors = _vision_tensors(config, _with_head(source, size))
    tensors |= {f"text_model.{k}": v for k, v in to_torch(text, siglip.TEXT_NAMES).items()}
    tensors["logit_scale"] = np.reshape(params["log_scale"], 1)
    tensors["logit_bias"] = np.reshape(params.get("bias", np.float32(0)), 1)

    fields, special = text_config(source)
    architecture = {
        "architectures": [f"{name(config)}Model"],
        "model_type": name(config).lower(),
        "text_config": {
            "model_type": f"{name(config).lower()}_text_model",
            **fields,
            "projection_size": len(projection["bias"]),
            **special,
        },
        "vision_config": vision_config(config) | {"vision_use_head": True},
    }
    write_model(folder, config, architecture, tensors, processor_class=f"{name(config)}Processor")
    write_tokenizer(folder, source)


def text_config(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the fields of a text model's config, and the ids of special tokens."""
    config, options = source.config, learners.options(source.config)
    embeddings = without_padding(source.inside("text_tower"), source)["embedding/embedding"]
    return {
        **sizes(options.tower(text_size(config))),
        "vocab_size": len(embeddings),
        "max_position_embeddings": config.text.length,
        "hidden_act": _HIDDEN_ACTS[options.text_activation],
        "layer_norm_eps": options.text_norm_eps,
    }, _special_ids(source)


def _special_ids(source: Source) -> dict[str, int | None]:
    if source.byte_pairs is not None:
        return dict(byte_pairs.special_ids(source.byte_pairs))
    assert source.tokenizer is not None
    return fast_tokenizer.special_ids(source.tokenizer)


def without_padding(params: Params, source: Source) -> dict[str, np.ndarray]:
    """Return parameters of a text tower whose embeddings are those of the tokenizer's own ids.

    Ours of byte pairs have padding before them; see `convert.towers`.
    """
    path = "embedding/embedding"
    return {**params, path: params[path][1 if source.byte_pairs is not None else 0 :]}


def write_tokenizer(folder: Path, source: Source) -> None:
    """Write the files of the run's tokenizer."""
    text = source.config.text
    if source.byte_pairs is not None:
        files = byte_pairs.exported(source.byte_pairs, text.length)
    else:
        assert source.tokenizer is not None
        files = fast_tokenizer.files(
            source.tokenizer, length=text.length, lower=text.lower, punctuation=text.punctuation
        )
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _with_head(source: Source, size: Size) -> dict[str, np.ndarray]:
    """Return the parameters of an encoder with the pooling head that makes vectors of images."""
    head, encoder = source.config.learner.head, source.inside("encoder")
    plain = {path: array for path, array in encoder.items() if not path.startswith("head/")}
    if head == "map":
        own = source.inside("image_pooling")
        return plain | {f"head/{path}": array for path, array in own.items()}
    if head == "none" and source.config.model.pool == "map":
        return encoder
    width = size.width
    projection = {"kernel": np.eye(width, dtype=np.float32), "bias": np.zeros(width, np.float32)}
    return plain | mean_head(width, size.mlp, projection | source.inside("image_projection"))


def vision_config(config: ConfigDict) -> dict[str, Any]:
    """Return the config of a SiglipVisionModel; raises UserError like `form`."""
    made = form(config)
    fields = vision_fields(made)
    if config.data.layout == NAFLEX:
        del fields["image_size"]
        fields["num_patches"] = (made.image_size // made.patch) ** 2
    return {
        "model_type": f"{name(config).lower()}_vision_model",
        **fields,
        "vision_use_head": made.options.pool == "map",
    }


def vision_fields(form: Form) -> dict[str, Any]:
    """Return the fields that the configs of all vision models have."""
    return {
        **sizes(form.size),
        "image_size": form.image_size,
        "patch_size": form.patch,
        "num_channels": 3,
        "hidden_act": _HIDDEN_ACTS[form.options.activation],
        "layer_norm_eps": form.options.norm_eps,
    }


def preprocessor_config(config: ConfigDict) -> dict[str, Any]:
    """Return preprocessing as in our evaluation, but interpolating, not averaging areas."""
    side, (mean, std) = config.data.image_size, OURS
    square = {"height": side, "width": side}
    geometry: dict[str, Any]
    if config.data.layout == NAFLEX:
        patch = patch_of(config)
        geometry = {
            "image_processor_type": "Siglip2ImageProcessor",
            "patch_size": patch,
            "max_num_patches": (side // patch) ** 2,
        }
    elif config.data.crop == "none":
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


def sizes(size: Size) -> dict[str, int]:
    """Return the fields of a config.json that give the size of a transformer."""
    return {
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "intermediate_size": size.mlp,
        "num_attention_heads": size.heads,
    }


def _vision_tensors(config: ConfigDict, encoder: Params) -> dict[str, np.ndarray]:
    prefix = siglip.FAMILY.prefix  # which transformers 4 needs even for a vision model alone
    tensors = to_torch(encoder, siglip.NAMES)
    if config.data.layout == NAFLEX:
        tensors[siglip2.PATCH_EMBEDDING] = siglip2.linear(encoder["patch_embedding/kernel"])
    return {prefix + name: tensor for name, tensor in tensors.items()}


def write_model(
    folder: Path,
    config: ConfigDict,
    architecture: dict[str, Any],
    tensors: dict[str, np.ndarray],
    **preprocessing: Any,
) -> None:
    """Write config.json, weights and preprocessor_config.json, the last with more fields."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", architecture)
    write_json(folder / "preprocessor_config.json", preprocessor_config(config) | preprocessing)
