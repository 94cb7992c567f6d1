"""What layouts are given of a run, what they return, and the files that they share."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.convert.encoder import Form
from cap_pretrain.errors import UserError
from cap_pretrain.learners.dual_encoder import DualEncoder
from cap_pretrain.models.build import encoder_options, encoder_size
from cap_pretrain.models.sizes import CONVNETS, parse_name
from cap_pretrain.models.vit import Options
from cap_pretrain.naflex import SQUARE

Params = Mapping[str, np.ndarray]  # by path

TRANSFORMERS = "transformers"

BILINEAR = "bilinear"  # resampling of the libraries' own preprocessing


@dataclasses.dataclass(frozen=True)
class Source:
    """A run's model.

    Attributes:
        config: Config of the run.
        params: Parameters of its learner, by path.
        tokenizer: Its sentencepiece model; None if there is none.
        byte_pairs: its tokenizer.json of CLIP's byte pairs, or None.
        place: Where the export will lie, as its files name it: "local-dir:FOLDER" or
            "hf-hub:OWNER/NAME".
    """

    config: ConfigDict
    params: Params
    tokenizer: bytes | None
    place: str
    byte_pairs: bytes | None = None

    def dual_encoder(self) -> tuple["Source", str]:
        """Return the dual encoder in a joint learner as a separate run, and what is left out.

        Of several, it is the first by name. Any other learner is returned as it is, with "".
        """
        members = learners.members(self.config)
        found = next((member for member in members if member.kind is DualEncoder), None)
        if found is None or not found.name:
            return self, ""
        inside = f"parts/{found.name}/"
        own = {k.removeprefix(inside): v for k, v in self.params.items() if k.startswith(inside)}
        own |= {k: v for k, v in self.params.items() if k.startswith("encoder/")}
        others = [name for name in sorted(self.config.learner.parts) if name != found.name]
        left_out = f"the parts {', '.join(others)}, which stay in the checkpoint" if others else ""
        return dataclasses.replace(self, config=found.config, params=own), left_out

    @property
    def shown_place(self) -> str:
        """The place as a model card may show it, without a folder of this machine."""
        kind = self.place.partition(":")[0]
        return self.place if kind == "hf-hub" else f"{kind}:FOLDER"

    def inside(self, module: str) -> dict[str, np.ndarray]:
        """Return the parameters of a module, by path inside it."""
        prefix = f"{module}/"
        return {k.removeprefix(prefix): v for k, v in self.params.items() if k.startswith(prefix)}


@dataclasses.dataclass(frozen=True)
class Written:
    """What a layout wrote.

    Attributes:
        library: Name of the library on the Hugging Face hub.
        usage: Paragraphs of Markdown that show how to load it.
        parts: What lies beside the encoder, one line each; the first word is its folder.
        left_out: What could not be exported, and why; "" if nothing.
    """

    library: str
    usage: tuple[str, ...]
    parts: tuple[str, ...] = ()
    left_out: str = ""


def vit_form(config: ConfigDict, library: str, otherwise: str = "") -> Form:
    """Return the architecture of a ViT for RGB images; raises UserError for another encoder.

    `otherwise` is what a message says of an encoder that is no ViT.
    """
    if config.model.name in CONVNETS:
        what = otherwise or f"is not a ViT, and cannot be exported for {library}"
        raise UserError(
            f"model.name: {config.model.name} {what}; pass its workdir as --config.encoder instead."
        )
    if config.model.colours != "rgb":
        raise UserError(
            f"model.colours: the encoder takes {config.model.colours} only, which image processors "
            f"of {library} cannot compute, so it cannot be exported; pass its workdir as "
            "--config.encoder instead."
        )
    if config.data.layout != SQUARE and library != TRANSFORMERS:
        raise UserError(
            f"data.layout: {config.data.layout} has no counterpart in {library}; export for "
            f"{TRANSFORMERS}, whose SigLIP 2 reads such images."
        )
    options = encoder_options(config)
    for field in ("positions", "patch_norm", "gated", "bias", "norm"):
        if getattr(options, field) != getattr(Options, field):
            raise UserError(
                f"model.{field}: an encoder with {getattr(options, field)!r} cannot be exported "
                f"for {library}; pass its workdir as --config.encoder instead."
            )
    _, patch = parse_name(config.model.name)
    return Form(encoder_size(config), patch, config.data.image_size, options)


def check_encoder(config: ConfigDict, encoder: Params, form: Form) -> None:
    """Raise UserError if the encoder in the checkpoint is not the one that `form` describes."""
    if {path: array.shape for path, array in encoder.items()} != form.shapes():
        raise UserError(
            f"model: the encoder in the checkpoint is not the {config.model.name} that config.json "
            "describes; only ViTs can be exported."
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file of tensors of PyTorch."""
    from safetensors.numpy import save_file

    # Some versions of transformers reject weights without this metadata.
    save_file(dict(tensors), path, metadata={"format": "pt"})


def mlp_ratio(width: int, mlp: int) -> float:
    """Return a ratio r for which int(width * r), as torch models compute it, is `mlp`."""
    ratio = mlp / width
    return ratio if int(width * ratio) == mlp else (mlp + 0.5) / width
