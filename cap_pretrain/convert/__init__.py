"""Import and export of vision encoders in the formats of other libraries.

`open_encoder` reads folders that `transformers` wrote (CLIP, SigLIP, ViT; tools/export_encoder.py
writes SigLIP), checkpoints in the layout of OpenAI's CLIP, and ResNets and AlexNet under
torchvision's names, such as VISSL's. Each of these has a module with a table of names. Nothing is
downloaded, and no pickle is executed.
"""

from pathlib import Path

from cap_pretrain.convert import huggingface, openai, torchvision
from cap_pretrain.convert.encoder import Pretrained
from cap_pretrain.convert.weights import SUFFIXES, open_file
from cap_pretrain.errors import UserError

__all__ = ["Pretrained", "open_encoder"]


def open_encoder(path: str | Path) -> Pretrained:
    """Read a vision encoder.

    Args:
        path: one of

            - a folder with config.json and model.safetensors (or shards with their index, or
              pytorch_model.bin) of a CLIP, SigLIP or ViT of `transformers`, or of its vision model
              alone;
            - a folder with open_clip_config.json and open_clip_model.safetensors (or
              open_clip_pytorch_model.bin);
            - a file (.safetensors, .pt or .pth) in the layout of OpenAI's CLIP, or with the state
              dict of a ResNet or AlexNet under torchvision's names;
            - a folder with one such file.

    Raises:
        UserError: the path does not exist or is none of these; weights are missing or unknown,
            which the message names; or reading a file would execute code.
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
    found = "has neither a" if path.is_dir() else "is not a file, nor a folder with a"
    raise UserError(
        f"{path}: {found} {huggingface.CONFIG} of transformers, an {openai.CONFIG} or one file of "
        "weights. Nothing is downloaded here: fetch the encoder first and give its path."
    )
