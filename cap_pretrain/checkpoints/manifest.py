"""What a checkpoint says it holds: path, shape, dtype and fingerprint of every array.

Compared with what is wanted it tells the checkpoint of another model, compared with what is read it
tells damage. It is saved with the arrays, and has a checksum of its own.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from cap_pretrain import rules

Leaves = dict[str, dict[str, Any]]


class Damaged(Exception):
    """A checkpoint that is not what was saved; the message says in what."""


def describe(tree: Any, prints: Mapping[str, Any] | None = None) -> Leaves:
    """Path -> shape, dtype and, if given, fingerprint of each array of `tree`."""
    leaves = {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for path, leaf in rules.flatten(tree).items()
    }
    for path, value in jax.device_get(prints or {}).items():
        leaves[path]["fingerprint"] = int(value)
    return leaves


def shape_of(leaf: Mapping[str, Any] | None) -> str:
    """What people read of a leaf that `describe` gave, or of none."""
    return f"{leaf['dtype']} {leaf['shape']}" if leaf else "missing"


def make_manifest(step: int, identity: Mapping[str, str], leaves: Leaves) -> dict[str, Any]:
    """Returns the manifest of a checkpoint, as JSON."""
    manifest = {"step": step, "identity": dict(identity), "leaves": leaves}
    return {**manifest, "checksum": _checksum(manifest)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of the checkpoint in `folder`; raises Damaged if it is not sound."""
    try:
        manifest = json.loads((folder / "manifest" / "metadata").read_text(encoding="utf-8"))
        checksum = manifest.pop("checksum")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
        raise Damaged(f"{folder}: is damaged (its manifest is missing)") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Damaged(f"{folder}: is damaged (its manifest is not readable)") from e
    if checksum != _checksum(manifest):
        raise Damaged(f"{folder}: is damaged (its manifest has changed)")
    if str(manifest["step"]) != folder.name:
        raise Damaged(f"{folder}: is damaged (it holds step {manifest['step']})")
    return manifest


def compare(folder: Path, found: Leaves, saved: Leaves) -> None:
    """Raises Damaged unless what was found is what was saved."""
    for path in [*saved, *(path for path in found if path not in saved)]:
        if found.get(path) != saved.get(path):
            raise Damaged(f"{folder}: is damaged ({path} is not what was saved)")


def _checksum(manifest: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
