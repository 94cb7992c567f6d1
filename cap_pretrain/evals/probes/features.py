"""Features of a frozen encoder: computed once for each dataset, kept on disk, read by many probes.

They are exact: every image counts once and, on one kind of device, to the last bit the same (on
GPUs if the same kernels are chosen), whatever the batch size and the mesh. What is fitted to them
is small and computed on one device of each host (`on_one_device`), so that its figures do not
depend on the mesh either.
"""

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import AxisType

import cap_pretrain
from cap_pretrain import files, fingerprint
from cap_pretrain.data.sources.base import Source
from cap_pretrain.distributed import cluster, sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context
from cap_pretrain.evals.portions import EveryImage
from cap_pretrain.models import readout
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.models.sizes import STORED

PIXELS = 16
"""Side of the images that the layer "pixels" gives."""

_SAMPLED = 16  # examples that stand for the content of a dataset


class Labelled(NamedTuple):
    """Features float32 [N, D] and labels int32 [N]."""

    features: np.ndarray
    labels: np.ndarray


class Features:
    """The features of a labelled source, in its order.

    Images that do not decode or have no label are left out.

    `WORKDIR/features/` has one file for each source and layer, with the features that the last
    weights gave and what they depend on.

    Args:
      context: what evaluators work with.
      source: labelled images.
      layer: "pooled"; "tokens", the mean of the encoder's tokens; one of the encoder's `layers`, as
        "block_6", the mean of what leaves it; "pixels", no encoder at all: the image, shrunk to
        16 x 16 pixels.
      batch_size: images a batch; a matter of memory and speed alone.

    Raises:
      UserError: the images have no labels, going by the first one; or no pixels.
    """

    def __init__(self, context: Context, source: Source, *, layer: str, batch_size: int):
        if source[0]["label"] < 0:
            raise UserError(
                f"evals: {source} has no labels to probe for; name another dataset, or set "
                "data.fields.label."
            )
        if layer == "pixels" and context.config.model.name == STORED:
            raise UserError(f"evals: {source} holds features, so there are no pixels to probe.")
        self._context, self._source, self._layer = context, source, layer
        self._identity = {
            "version": cap_pretrain.__version__,
            "source": _identity(source),
            "layer": layer,
            "image_size": context.config.data.image_size,
            "crop": context.config.data.crop,
        }

        def encode(learner, images, labels):
            return _encode(learner, layer, images), labels

        self._encode = EveryImage(context, encode, batch_size)

    def __call__(self, variables: Any) -> Labelled:
        """Returns the features that these weights give, on every host.

        Raises:
          UserError: there is no such layer, no image decodes, or features are not finite.
          evals.Interrupted: the run is to stop.
          OSError: the file cannot be written.
        """
        path, key = self._path(), self._key(variables)
        found = _read(path, key) if path else None
        if not cluster.decided(found is not None, all):  # all compute, or none
            found = self._computed(variables)
            if path and jax.process_index() == 0:
                _write(path, key, found)
        return found

    def _computed(self, variables: Any) -> Labelled:
        found = Labelled(*self._encode(variables, self._source))
        found = Labelled(*(part[found.labels >= 0] for part in found))
        if not np.isfinite(found.features).all():
            raise UserError(
                f"evals: features ({self._layer}) of {self._source} are not finite; the encoder's "
                "weights are at fault, or too large for its dtype."
            )
        return found

    def _path(self) -> Path | None:
        if self._context.workdir is None:
            return None
        digest = hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()
        return self._context.workdir / "features" / f"{self._layer}-{digest[:16]}.npz"

    def _key(self, variables: Any) -> str:
        """All that the features depend on, as text."""
        key = dict(self._identity)
        if self._layer != "pixels":
            encoder = nnx.merge(self._context.graphdef, *variables).encoder
            graphdef, weights = nnx.split(encoder)
            compute = jax.jit(
                fingerprint.fingerprints, out_shardings=sharding.replicated(self._context.mesh)
            )
            found = jax.device_get(compute(nnx.to_pure_dict(weights)))
            key["weights"] = {path: int(value) for path, value in found.items()}
            # What it does with them; the functions in it have addresses.
            key["encoder"] = re.sub(" at 0x[0-9a-f]+", "", str(graphdef))
        return json.dumps(key)


def on_one_device() -> contextlib.AbstractContextManager:
    """What is computed within lies on one device, the first of each host."""
    axes = ("data", "fsdp", "tensor")
    kinds = (AxisType.Auto,) * len(axes)
    one = jax.make_mesh((1, 1, 1), axes, axis_types=kinds, devices=jax.local_devices()[:1])
    return jax.set_mesh(one)


def _encode(learner: nnx.Module, layer: str, images: jax.Array) -> jax.Array:
    """uint8 [B, H, W, 3] -> float32 [B, D]."""
    if layer == "pixels":
        shape = (len(images), PIXELS, PIXELS, 3)
        small = jax.image.resize(images.astype(jnp.float32), shape, "bilinear")
        return small.reshape(len(images), -1) / 255
    return readout.read(learner.encoder, layer, normalize_images(images, jnp.float32))


def _identity(source: Source) -> str:
    """A name for what a source holds: another name, length, or one of a few examples, another."""
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLED).astype(int)):
        example = source[int(index)]
        image = example["image"]
        digest.update(image if isinstance(image, bytes) else image.tobytes())
        digest.update(f"{example['id']} {example['label']}".encode())
    return f"{source}, {len(source)} examples, {digest.hexdigest()}"


def _read(path: Path, key: str) -> Labelled | None:
    """The features at `path` if they are there, whole, and those of `key`."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:  # a zip: what is read is compared with its checksum
            if str(file["key"]) == key:
                return Labelled(file["features"], file["labels"])
    except Exception as error:  # whatever NumPy and the zip stumble over
        logging.warning("%s is damaged (%s); it is computed again.", path, error)
    return None


def _write(path: Path, key: str, found: Labelled) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    with files.naming(path):
        with fresh.open("wb") as file:
            np.savez(file, key=np.array(key), **found._asdict())
        os.replace(fresh, path)
