"""Pretraining vision encoders by captioning, in JAX.

    model = cap_pretrain.load("runs/cappa")
    vectors = model.embed("photos")

docs/python.md describes `load`, the `Model` that it returns, and `train`. `import cap_pretrain`
alone is light: JAX is imported with the first of these that is used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# The types of these names are in __init__.pyi. Imports here would be circular: parts of the package
# read the version.
_LAZY = {
    "Model": "cap_pretrain.api",
    "UserError": "cap_pretrain.errors",
    "load": "cap_pretrain.api",
}

__all__ = ["Model", "UserError", "__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is first used (PEP 562)."""
    if name == "train":  # a module that can be called: see its end
        return importlib.import_module("cap_pretrain.train")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """Return the names of the interface besides those of modules that are imported."""
    return sorted({*globals(), *__all__})
