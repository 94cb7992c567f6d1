"""Encoders of other ecosystems, and ours for them.

`open_encoder` reads what others have: folders that `transformers` wrote (CLIP, SigLIP, ViT; what
tools/export_encoder.py writes is a SigLIP), checkpoints in the layout of OpenAI's CLIP, and ResNets
and AlexNet under torchvision's names, such as VISSL's. Each ecosystem has a file with a table of
names. Nothing is downloaded and no pickle is executed.
"""

from pathlib import Path

from cap_pretrain.convert import huggingface, openai, torchvision
from cap_pretrain.convert.encoder import Pretrained
from cap_pretrain.convert.weights import SUFFIXES, open_file
from cap_pretrain.errors import UserError

__all__ = ["Pretrained", "open_encoder"]


def open_encoder(path: str | Path) -> Pretrained:
    """Reads a vision encoder.

    Args:
      path: a folder with config.json and model.safetensors (or its shards with their index, or
        pytorch_model.bin) of a CLIP, SigLIP or ViT of `transformers`, or of its vision part alone;
        a folder with open_clip_config.json and open_clip_model.safetensors (or
        open_clip_pytorch_model.bin); a file in OpenAI's layout or with a state dict of a ResNet or
        AlexNet under torchvision's names, .safetensors, .pt or .pth; a folder with such a file.

    Raises:
      UserError: there is no such thing; it is none of these; weights are missing or unknown (which
        is told by name); a file would have to execute code to be read.
    """
    path = Path(path)
    for config, opens in (
        (huggingface.CONFIG, huggingface.open_folder),
        (openai.CONFIG, openai.open_folder),
    ):
        if (path / config).is_file():
            return opens(path)
    files = [path] if path.is_file() else [f for f in path.glob("*") if f.suffix in SUFFIXES]
    if len(files) == 1:
        weights = open_file(files[0])
        return torchvision.read(weights) or openai.read(weights)
    found = "has neither a" if path.is_dir() else "is no file, nor a folder with a"
    raise UserError(
        f"{path}: {found} {huggingface.CONFIG} of transformers, an {openai.CONFIG} or one file of "
        "weights. Nothing is downloaded here: fetch the encoder first and give its path."
    )
