"""Reading tensors by name from safetensors, one file or shards, and from torch's own files.

The latter are read with `weights_only`: no pickle is executed.
"""

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - with it, NumPy knows bfloat16
import numpy as np

from cap_pretrain.errors import UserError

# Names that torch's files go by, and all that weights come in.
_TORCH = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *_TORCH)
# Where a state dict is in what training saves: as OpenCLIP and many others do, and VISSL.
_INSIDE = (("state_dict",), ("classy_state_dict", "base_model", "model", "trunk"))
# Before it, a crafted file could execute code in spite of weights_only (CVE-2025-32434).
_SAFE_TORCH = (2, 6)


class Missing(KeyError):
    """There is no tensor of that name."""


class Weights:
    """Tensors by name, each read when it is taken.

    Attributes:
      where: the file or folder, for messages.
      names: of all there are.
      taken: names of those that were.
    """

    def __init__(self, read: Mapping[str, Callable[[], Any]], where: Path):
        self._read, self.where = read, where
        self.names, self.taken = tuple(read), set()

    def without(self, prefix: str) -> "Weights":
        """The same, with `prefix` cut off from the names that have it."""
        cut = {name.removeprefix(prefix): read for name, read in self._read.items()}
        return Weights(cut, self.where)

    def take(self, name: str) -> np.ndarray:
        """The tensor as float32, whatever it is stored in; raises Missing."""
        if name not in self._read:
            raise Missing(name)
        self.taken.add(name)
        return np.asarray(self._read[name](), np.float32)


def open_file(path: Path) -> Weights:
    """Opens a .safetensors file, or one of torch's with nothing but tensors.

    Raises:
      UserError: it is missing, broken, or would have to execute code to be read.
    """
    return Weights(_tensors(path), path)


def open_folder(folder: Path, *files: str) -> Weights:
    """Opens the first of `files` there is; one that ends in .index.json names its shards.

    Raises:
      UserError: there is none of them, or as `open_file`.
    """
    for name in files:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return open_file(path)
        shards = set(read_json(path).get("weight_map", {}).values())
        read = {
            k: v for shard in sorted(shards) for k, v in open_file(folder / shard)._read.items()
        }
        return Weights(read, folder)
    raise UserError(f"{folder}: has no weights; it needs one of {', '.join(files)}.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises UserError if there is none to be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e}).") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no JSON object.")
    return content


def _tensors(path: Path) -> dict[str, Callable[[], Any]]:
    return _torch_file(path) if path.suffix in _TORCH else _safetensors_file(path)


def _safetensors_file(path: Path) -> dict[str, Callable[[], Any]]:
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"{path}: cannot be read as safetensors ({e}).") from e
    return {name: lambda name=name: file.get_tensor(name) for name in file}


def _torch_file(path: Path) -> dict[str, Callable[[], Any]]:
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f"{path}: reading it needs PyTorch; install torch, or give a .safetensors file."
        ) from e
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise UserError(
            f"{path}: PyTorch {torch.__version__} cannot read it safely; install torch>=2.6, or "
            "give a .safetensors file."
        )
    try:
        if zipfile.is_zipfile(path) and _is_program(path):
            raise UserError(
                f"{path}: is a TorchScript archive, a program that would have to be run. If you "
                'trust it, take its weights out once, and give that file:\n    python -c "import '
                "torch; torch.save(torch.jit.load('FILE.pt', 'cpu').state_dict(), 'WEIGHTS.pt')\""
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as e:  # a broken or hostile file fails in any way
        raise UserError(
            f"{path}: holds more than tensors, or is broken, and was not read: executing what it "
            "holds could do anything. Give a state dict, or a .safetensors file."
        ) from e
    for keys in _INSIDE:
        inside = content
        for key in keys:
            inside = inside.get(key) if isinstance(inside, dict) else None
        content = inside if isinstance(inside, dict) else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} instead of a state dict.")
    # "module.": as DistributedDataParallel names them.
    return {
        name.removeprefix("module."): lambda tensor=tensor: tensor.float().numpy()
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }


def _is_program(path: Path) -> bool:
    """Whether a zip file of torch's holds TorchScript."""
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())
