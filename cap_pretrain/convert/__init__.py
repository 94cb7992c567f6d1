"""Import and export of vision encoders in other libraries' formats, each with a table of names."""

from pathlib import Path

from cap_pretrain.convert import huggingface, openai, torchvision
from cap_pretrain.convert.encoder import Pretrained
from cap_pretrain.convert.layouts import timm
from cap_pretrain.convert.weights import SUFFIXES, few, open_file, read_json
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import checked

__all__ = ["Pretrained", "crops_center", "open_encoder"]


def open_encoder(path: str | Path) -> Pretrained:
    """Read a vision encoder; raises UserError if there is none or its weights do not fit.

    `path` is a file (.safetensors, .pt or .pth) in the layout of OpenAI's CLIP, or with the state
    dict of a ResNet or AlexNet under torchvision's names, such as VISSL's; a folder with one such
    file; or a folder that `transformers` wrote, with a CLIP, SigLIP or ViT or its vision model
    alone, or OpenCLIP, or an export in any layout. Nothing is downloaded, and a file whose reading
    would execute code is refused.
    """
    path = Path(path)
    for config, opens in (
        (huggingface.CONFIG, _open_config),
        (openai.CONFIG, openai.open_folder),
    ):
        if (path / config).is_file():
            return opens(path)
    files = [path]
    if not path.is_file():
        files = sorted(f for f in path.glob("*") if f.suffix in SUFFIXES and f.is_file())
    if len(files) > 1:
        raise UserError(
            f"{path}: has {len(files)} files of weights ({few(f.name for f in files)}); give the "
            "path of one."
        )
    if files:
        weights = open_file(files[0])
        return torchvision.read(weights) or openai.read(weights)
    found = "has neither a" if path.is_dir() else "is not a file, nor a folder with a"
    raise UserError(
        f"{path}: is not the folder of a run, and {found} {huggingface.CONFIG} of transformers, an "
        f"{openai.CONFIG} or one file of weights. Nothing is downloaded here: "
        "fetch the encoder first and give its path."
    )


def crops_center(path: str | Path) -> bool:
    """Return whether the preprocessing of an encoder takes the central square of an image.

    Otherwise it squashes the whole image. Folders of `transformers`, timm and OpenCLIP say so in
    their files; OpenAI's CLIP and torchvision crop.
    """
    path = Path(path)
    if (where := path / huggingface.CONFIG).is_file():
        config = read_json(where)
        if "model_args" in config:  # of timm
            settings = checked(config.get("pretrained_cfg") or {}, "pretrained_cfg", dict, where)
            return settings.get("crop_mode") != "squash"
        return huggingface.crops_center(path)
    if (where := path / openai.CONFIG).is_file():
        settings = read_json(where).get("preprocess_cfg") or {}
        return checked(settings, "preprocess_cfg", dict, where).get("resize_mode") != "squash"
    return True


def _open_config(folder: Path) -> Pretrained:
    """Read a folder with a config.json, which transformers and timm write."""
    of_timm = "model_args" in read_json(folder / huggingface.CONFIG)
    return (timm if of_timm else huggingface).open_folder(folder)
