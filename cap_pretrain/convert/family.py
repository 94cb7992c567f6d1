"""Description of a family of vision models that `transformers` writes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from cap_pretrain.convert.tables import Entry, Table
from cap_pretrain.models.vit import Options, Resample, resample_positions
from cap_pretrain.naflex import SQUARE

_LAYER = "encoder.layers.{}."

BLOCKS: dict[str, Entry] = {
    "blocks/norm1": _LAYER + "layer_norm1",
    "blocks/attention/query": _LAYER + "self_attn.q_proj",
    "blocks/attention/key": _LAYER + "self_attn.k_proj",
    "blocks/attention/value": _LAYER + "self_attn.v_proj",
    "blocks/attention/out": _LAYER + "self_attn.out_proj",
    "blocks/norm2": _LAYER + "layer_norm2",
    "blocks/mlp/up": _LAYER + "mlp.fc1",
    "blocks/mlp/down": _LAYER + "mlp.fc2",
}
"""Names of the transformer blocks, the same for the vision and text models of CLIP and SigLIP."""


@dataclasses.dataclass(frozen=True)
class Family:
    """How `transformers` describes and names the vision models of one kind.

    `describe` maps a vision model's config to options, except activation and epsilon, and its
    table.
    """

    name: str  # for messages
    prefix: str  # of the vision model's weights inside a larger model
    describe: Callable[[dict[str, Any]], tuple[Options, Table]]
    ignored: tuple[str, ...]  # prefixes of the names of weights that belong to other parts
    defaults: Mapping[str, Any]  # fields that the config may omit, besides `huggingface.DEFAULTS`
    mean: tuple[float, ...]  # per channel, of the preprocessing, unless a file gives it
    std: tuple[float, ...]  # likewise
    # Fills in the fields of `huggingface.DEFAULTS` that such configs call otherwise.
    complete: Callable[[dict[str, Any], object], dict[str, Any]] = lambda config, _: config
    resample: Resample = resample_positions  # how it fits positions to other sizes of images
    layout: str = SQUARE  # `data.layout` of its images
