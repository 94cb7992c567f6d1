"""Reads tensors by name from safetensors (a file or shards) and, without pickle, torch's files.

Names and shapes are known before anything is read; `tables.to_ours` checks them first, so that
memory and time depend on the size of the file, not on what a config claims.
"""

import functools
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - with it, NumPy knows bfloat16
import numpy as np

from cap_pretrain import files
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import check_stored, checked, open_regular, parsing, path_part, shown

_TORCH = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *_TORCH)
# Paths of the state dict in a training checkpoint: of OpenCLIP and many others, and of VISSL.
_INSIDE = (("state_dict",), ("classy_state_dict", "base_model", "model", "trunk"))
_SAFE_TORCH = (2, 6)  # before, a file could run code in spite of weights_only (CVE-2025-32434)

MAX_HEADER = 2**24
"""Largest header of a safetensors file in bytes, some 160,000 tensors; the format allows 100 MB."""

MAX_CONFIG = 2**24
"""Largest JSON file of an encoder folder in bytes, the list of its shards included."""

MAX_SHARED = 4
"""How often the tensors of a torch file may share its bytes on average, by tying or expanding."""

_LISTED = 6  # names in a message


class MissingTensorError(UserError):
    """There is no tensor of this name."""

    def __init__(self, where: Path, name: str):
        super().__init__(f"{where}: its weights do not fit the model: it lacks {few([name])}.")
        self.name = name


class Tensor(NamedTuple):
    """A tensor in a file: its shape, and a function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], Any]


class Weights:
    """Tensors by name, each read when it is taken.

    `where` is the file or folder, for messages; `names` are the names of all tensors, and `used` of
    those whose shape was asked for.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: Path):
        self._tensors, self.where = tensors, where
        self.names = tuple(tensors)
        self.used: set[str] = set()

    def without(self, prefix: str) -> "Weights":
        """Return the same tensors, with `prefix` removed from the names that have it."""
        return Weights(_renamed(self._tensors, prefix, self.where), self.where)

    def shape(self, name: str, dimensions: int | None = None) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it.

        Raises MissingTensorError, or UserError if it has not so many `dimensions`.
        """
        if name not in self._tensors:
            raise MissingTensorError(self.where, name)
        self.used.add(name)
        shape = self._tensors[name].shape
        if dimensions not in (None, len(shape)):
            raise UserError(
                f"{self.where}: {name} has {len(shape)} dimensions, it must have {dimensions}."
            )
        return shape

    def take(self, name: str) -> np.ndarray:
        """Return a tensor as float32, whatever its stored dtype.

        Raises UserError if it cannot be read or has values that are not finite.
        """
        with parsing(f"{self.where}: {name}"), np.errstate(over="ignore"):
            array = np.asarray(self._tensors[name].read(), np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{self.where}: {name} has values that are not finite numbers.")
        return array


def open_file(path: Path) -> Weights:
    """Open a file that holds only tensors; raises UserError if it is none or would execute code."""
    with parsing(path), open_regular(path) as file:
        header = int.from_bytes(file.read(8), "little")
    if path.suffix in _TORCH:
        return Weights(_torch_file(path), path)
    if header > MAX_HEADER:
        raise UserError(
            f"{path}: cannot be read as safetensors: its header claims {header:,} bytes, and may "
            f"have {MAX_HEADER:,}."
        )
    return Weights(_safetensors_file(path), path)


def open_folder(folder: Path, *names: str) -> Weights:
    """Open the first of the files `names` that exists; one in .index.json lists the shards.

    Raises UserError if there is none; see also `open_file`.
    """
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return open_file(path)
        shards = checked(read_json(path).get("weight_map"), "weight_map", dict, path).values()
        tensors: dict[str, Tensor] = {}
        for shard in sorted({path_part(shard, "shard", path) for shard in shards}):
            more = open_file(folder / shard)._tensors
            if twice := more.keys() & tensors.keys():
                raise UserError(f"{folder}: its shards hold {few(twice)} more than once.")
            tensors |= more
        return Weights(tensors, folder)
    raise UserError(f"{folder}: has no weights; it needs one of {', '.join(names)}.")


def read_json(path: Path, most: int = MAX_CONFIG) -> dict[str, Any]:
    """Return the object in a JSON file of at most so many bytes.

    Raises UserError if it is longer, is not valid JSON or not an object.
    """
    if path.is_file() and path.stat().st_size > most:
        raise UserError(f"{path}: has more than {most:,} bytes, too many for such a file.")
    content = files.read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object.")
    return content


def few(names: Iterable[str]) -> str:
    """Return the first of some names from data, for a message."""
    names = list(names)
    listed = [n if n.isprintable() and len(n) <= 80 else shown(n) for n in names[:_LISTED]]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(listed) + more


def _renamed(tensors: Mapping[str, Tensor], prefix: str, where: Path) -> dict[str, Tensor]:
    """Return `tensors` with `prefix` removed from names; raises UserError if two become equal."""
    renamed = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        twice = [n for n in renamed if n in tensors and prefix + n in tensors]
        raise UserError(f"{where}: has {few(twice)} with and without {prefix!r} before the name.")
    return renamed


def _safetensors_file(path: Path) -> dict[str, Tensor]:
    import safetensors

    with parsing(f"{path}, as safetensors"):
        tensors = safetensors.safe_open(path, framework="numpy")
        names = tensors.keys()  # it is not a dict: iterating over the file itself fails
        return {
            name: Tensor(
                tuple(tensors.get_slice(name).get_shape()),
                functools.partial(tensors.get_tensor, name),
            )
            for name in names
        }


def _torch_file(path: Path) -> dict[str, Tensor]:
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
    check_stored(path)
    if _is_program(path):
        raise UserError(
            f"{path}: is a TorchScript archive, a program that would have to be executed. If "
            "you trust it, extract its weights once, and give that file:\n    python -c "
            "\"import torch; torch.save(torch.jit.load('FILE.pt', 'cpu').state_dict(), "
            "'WEIGHTS.pt')\""
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
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
    tensors = {
        name: tensor
        for name, tensor in content.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }
    with parsing(path):
        size = sum(tensor.nbytes for tensor in tensors.values())
    if size > MAX_SHARED * path.stat().st_size:
        raise UserError(
            f"{path}: its tensors have {size:,} bytes, over {MAX_SHARED} times those of the file; "
            "save contiguous copies."
        )
    read = {
        name: Tensor(tuple(tensor.shape), functools.partial(_to_numpy, tensor))
        for name, tensor in tensors.items()
    }
    return _renamed(read, "module.", path)  # of DistributedDataParallel


def _to_numpy(tensor: Any) -> np.ndarray:
    return tensor.float().numpy()


def _is_program(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with parsing(path), zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())
