"""Layouts: the forms in which a run's model is exported for other libraries.

A layout is a module with `write(folder, source) -> base.Written`, which raises UserError where the
library cannot express the model. To add one, write a module and register it below; the program
`cap export --layout` then accepts it.
"""

import dataclasses
import importlib
from pathlib import Path

from cap_pretrain.convert.layouts.base import Source, Written
from cap_pretrain.errors import UserError, did_you_mean

__all__ = ["LAYOUTS", "Source", "Written", "write"]

LAYOUTS = {  # name: what it is for
    "transformers": "SiglipVisionModel; a CLIP or SigLIP run also as SiglipModel",
    "open_clip": "a CLIP or SigLIP run as open_clip.create_model loads it",
    "timm": "a ViT as timm.create_model loads it",
}


def write(layout: str, folder: Path, source: Source) -> Written:
    """Write the files of a layout into `folder`, which exists and is empty.

    Of a joint learner, a dual encoder in it is written.

    Raises UserError if the layout is unknown or cannot express the model.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--layout: no layout {layout!r}.{did_you_mean(layout, LAYOUTS)}")
    source, left_out = source.dual_encoder()
    written = importlib.import_module(f"{__name__}.{layout}").write(folder, source)
    whole = "; ".join(filter(None, (written.left_out, left_out)))
    return dataclasses.replace(written, left_out=whole)
