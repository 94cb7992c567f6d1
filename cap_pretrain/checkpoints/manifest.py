"""Checkpoint manifests: the path, shape, dtype and fingerprint of every saved array.

A manifest is saved with the arrays and carries its own checksum. A comparison with the expected
model detects a checkpoint of another model, and one with the arrays that were read corruption.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from cap_pretrain import rules
from cap_pretrain.errors import UserError
from cap_pretrain.untrusted import checked, entry, parse_json

Leaves = dict[str, dict[str, Any]]
"""Array path -> {"shape": list of int, "dtype": str, "fingerprint": int if known}."""


class CorruptCheckpointError(Exception):
    """A checkpoint differs from what was saved; the message says where."""


def describe(tree: Any, fingerprints: Mapping[str, Any] | None = None) -> Leaves:
    """Return the manifest entries of the arrays in `tree`, with their `fingerprints` if given."""
    leaves: Leaves = {
        path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
        for path, leaf in rules.flatten(tree).items()
    }
    for path, value in jax.device_get(fingerprints or {}).items():
        leaves[path]["fingerprint"] = int(value)
    return leaves


def format_leaf(leaf: Mapping[str, Any] | None) -> str:
    """Return dtype and shape of one manifest entry for messages, or "missing" for None."""
    return f"{leaf['dtype']} {leaf['shape']}" if leaf else "missing"


def make_manifest(
    step: int, identity: Mapping[str, str], leaves: Leaves, batches: Sequence[Sequence[int]] = ()
) -> dict[str, Any]:
    """Return the manifest of a checkpoint as a JSON-compatible dict, with its checksum."""
    sizes = [list(entry) for entry in batches]
    manifest = {"step": step, "identity": dict(identity), "leaves": leaves, "batches": sizes}
    return {**manifest, "checksum": _checksum(manifest)}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest in `folder` without its checksum; may raise CorruptCheckpointError."""
    path = folder / "manifest" / "metadata"
    if not path.is_file():
        raise CorruptCheckpointError(f"{folder}: is corrupt (its manifest is missing)")
    data = path.read_bytes()  # a failing disk raises OSError, and the checkpoint stays
    try:
        manifest = _parse(data, path)
    except UserError as e:
        raise CorruptCheckpointError(f"{folder}: is corrupt (its manifest is unreadable)") from e
    if manifest.pop("checksum") != _checksum(manifest):
        raise CorruptCheckpointError(f"{folder}: is corrupt (its manifest has changed)")
    if str(manifest["step"]) != folder.name:
        raise CorruptCheckpointError(f"{folder}: is corrupt (it holds step {manifest['step']})")
    return manifest


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    """Parse a manifest, with its checksum; raise UserError if an entry is not as written here."""
    manifest = checked(parse_json(data, path), "manifest", dict, path)
    for name in ("step", "checksum"):
        entry(manifest, name, int, path)
    for name, value in entry(manifest, "identity", dict, path).items():
        checked(value, name, str, path)
    for name, leaf in entry(manifest, "leaves", dict, path).items():
        entry(leaf, "dtype", str, path)
        entry(leaf, "fingerprint", int, path)
        for size in entry(leaf, "shape", list, path):
            checked(size, name, int, path)
    return manifest


def compare(folder: Path, found: Leaves, saved: Leaves) -> None:
    """Raise CorruptCheckpointError unless the entries `found` equal the entries `saved`."""
    for path in [*saved, *(path for path in found if path not in saved)]:
        if found.get(path) != saved.get(path):
            raise CorruptCheckpointError(
                f"{folder}: is corrupt ({path} differs from what was saved)"
            )


def _checksum(manifest: Mapping[str, Any]) -> int:
    """Return the CRC-32 of the manifest as JSON with sorted keys."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
