"""Reads tensors by name from safetensors (a file or shards) and, without pickle, torch's files."""

import functools
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - with it, NumPy knows bfloat16
import numpy as np

from cap_pretrain.errors import UserError

_TORCH = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *_TORCH)
# Paths of the state dict in a training checkpoint: of OpenCLIP and many others, and of VISSL.
_INSIDE = (("state_dict",), ("classy_state_dict", "base_model", "model", "trunk"))
_SAFE_TORCH = (2, 6)  # before, a file could run code in spite of weights_only (CVE-2025-32434)


class MissingTensorError(KeyError):
    """There is no tensor of this name."""


class Weights:
    """Tensors by name, each read when it is taken.

    `read` has a function for each name that reads the tensor; `where` is the file or folder, for
    messages; `names` are the names of all tensors, and `taken` of those that were taken.
    """

    def __init__(self, read: Mapping[str, Callable[[], Any]], where: Path):
        self._read, self.where = read, where
        self.names = tuple(read)
        self.taken: set[str] = set()

    def without(self, prefix: str) -> "Weights":
        """Return the same tensors, with `prefix` removed from the names that have it."""
        cut = {name.removeprefix(prefix): read for name, read in self._read.items()}
        return Weights(cut, self.where)

    def take(self, name: str) -> np.ndarray:
        """Return a tensor as float32, whatever its stored dtype; raises MissingTensorError."""
        if name not in self._read:
            raise MissingTensorError(name)
        self.taken.add(name)
        return np.asarray(self._read[name](), np.float32)


def open_file(path: Path) -> Weights:
    """Open a file that holds only tensors; raises UserError if it is none or would execute code."""
    return Weights(_tensors(path), path)


def open_folder(folder: Path, *files: str) -> Weights:
    """Open the first of `files` that exists; one that ends in .index.json lists the shards.

    Raises UserError if there is none; see also `open_file`.
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
    """Return the object in a JSON file; raises UserError if it is not valid JSON or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as JSON ({e}).") from e
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object.")
    return content


def _tensors(path: Path) -> dict[str, Callable[[], Any]]:
    return _torch_file(path) if path.suffix in _TORCH else _safetensors_file(path)


def _safetensors_file(path: Path) -> dict[str, Callable[[], Any]]:
    import safetensors

    try:
        file = safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as e:
        raise UserError(f"{path}: cannot be read as safetensors ({e}).") from e
    names = file.keys()  # it is not a dict: iterating over the file itself fails
    return {name: functools.partial(file.get_tensor, name) for name in names}


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
                f"{path}: is a TorchScript archive, a program that would have to be executed. If "
                "you trust it, extract its weights once, and give that file:\n    python -c "
                "\"import torch; torch.save(torch.jit.load('FILE.pt', 'cpu').state_dict(), "
                "'WEIGHTS.pt')\""
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as e:  # a corrupt or hostile file may raise anything
        raise UserError(
            f"{path}: holds more than tensors, or is corrupt, and was not read, since its pickle "
            "could execute any code. Give a state dict, or a .safetensors file."
        ) from e
    for keys in _INSIDE:
        inside = content
        for key in keys:
            inside = inside.get(key) if isinstance(inside, dict) else None
        content = inside if isinstance(inside, dict) else content
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__} instead of a state dict.")
    return {  # DistributedDataParallel adds the prefix "module."
        name.removeprefix("module."): functools.partial(_to_numpy, tensor)
        for name, tensor in content.items()
        if isinstance(tensor, torch.Tensor)
    }


def _to_numpy(tensor: Any) -> np.ndarray:
    return tensor.float().numpy()


def _is_program(path: Path) -> bool:
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())
