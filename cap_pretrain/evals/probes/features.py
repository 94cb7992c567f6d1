"""Features of a frozen encoder, computed once for each dataset and cached on disk for all probes.

They are exact: every image counts once, and on one kind of device they are bit-identical whatever
the batch size and the mesh (on GPUs if the same kernels are chosen). Probes are small and are
fitted on one device of each host (`on_one_device`), so their metrics do not depend on the mesh.
"""

import contextlib
import hashlib
import json
import re
import tempfile
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
from cap_pretrain.evals.inference.portions import EveryImage
from cap_pretrain.files import copies
from cap_pretrain.models import readout
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.models.sizes import STORED
from cap_pretrain.naflex import NAFLEX, SQUARE
from cap_pretrain.untrusted import check_stored

PIXELS = 16
"""Side of the images of the layer "pixels"."""

_SAMPLED = 16  # examples whose content identifies a dataset


class Labelled(NamedTuple):
    """Labeled features: float32 [N, D], and int32 [N]."""

    features: np.ndarray
    labels: np.ndarray


class Features:
    """Computes the features of a labeled source, in its order.

    Images that cannot be decoded or have no label are left out. `WORKDIR/features/` has one file
    for each source and layer, with the features of the latest weights and all that they depend on.
    `batch_size` affects only memory and speed.

    `layer` is "pooled"; "tokens", the mean of the encoder's tokens; one of the encoder's `layers`,
    as "block_6", the mean of its output tokens; or "pixels", without the encoder: the image,
    resized to 16 x 16 pixels. Raises UserError if the first image has no label, the layer does not
    exist, or for "pixels" of stored features.

    Attributes:
        dtype: name of the dtype of the features, for messages.
    """

    dtype = "float32"

    def __init__(self, context: Context, source: Source, *, layer: str, batch_size: int):
        if source[0]["label"] < 0:
            raise UserError(
                f"evals: {source} has no labels, which probes need; name another dataset, or set "
                "data.fields.label."
            )
        if layer == "pixels" and context.config.model.name == STORED:
            raise UserError(
                f"evals: layer: {source} holds features and has no pixels; choose another layer."
            )
        if layer == "pixels" and context.config.data.layout != SQUARE:
            raise UserError(
                "evals: layer: pixels are those of squares, which do not depend on the encoder; "
                f"set --config.data.layout={SQUARE} for them."
            )
        if layer != "pixels":
            encoder = nnx.eval_shape(lambda: build_encoder(context.config, nnx.Rngs(0)))
            readout.width(encoder, layer)
        self._context, self._source, self._layer = context, source, layer
        self._identity = {
            "version": cap_pretrain.__version__,
            "source": _identity(source),
            "layer": layer,
            "image_size": context.config.data.image_size,
            "crop": context.config.data.crop,
            **({} if context.config.data.layout == SQUARE else {"layout": NAFLEX}),
        }

        def encode(learner, images, labels):
            return self._features_of(learner, images), labels

        self._encode = EveryImage(context, encode, batch_size)

    def __call__(self, variables: Any) -> Labelled:
        """Return the features for these weights, on every host.

        Raises UserError if no image can be decoded or features are not finite; Interrupted if the
        run is stopping; OSError if the file cannot be written.
        """
        path, key = self._path(), self._key(variables)
        cached = _read(path, key) if path else None
        # Either all hosts compute, or none.
        if cluster.decided(cached is not None, all) and cached is not None:
            return cached
        computed = self._compute(variables)
        if path and jax.process_index() == 0:
            _write(path, key, computed)
        return computed

    def _features_of(self, learner: Any, images: jax.Array) -> jax.Array:
        """Return the features [B, D] float32 of images uint8 [B, H, W, 3]."""
        if self._layer == "pixels":
            return small_images(images).reshape(len(images), -1)
        return readout.read(learner.encoder, self._layer, normalize_images(images, jnp.float32))

    def _compute(self, variables: Any) -> Labelled:
        return self._checked(Labelled(*self._encode(variables, self._source)))

    def _checked(self, found: Labelled) -> Labelled:
        """Return the examples that have a label; raise UserError if any is not finite."""
        found = Labelled(*(part[found.labels >= 0] for part in found))
        if not np.isfinite(found.features).all():
            raise UserError(
                f"evals: features ({self._layer}) of {self._source} are not finite in "
                f"{self.dtype}; choose another layer, or check the encoder's weights and dtype."
            )
        return found

    def _path(self) -> Path | None:
        if self._context.workdir is None:
            return None
        digest = hashlib.sha256(json.dumps(self._identity).encode()).hexdigest()
        return self._context.workdir / "features" / f"{self._layer}-{digest[:16]}.npz"

    def _key(self, variables: Any) -> str:
        """Return all that the features depend on, as text."""
        key = dict(self._identity)
        if self._layer != "pixels":
            learner: Any = nnx.merge(self._context.graphdef, *variables)
            graphdef, weights = nnx.split(learner.encoder)
            compute = jax.jit(
                fingerprint.fingerprints, out_shardings=sharding.replicated(self._context.mesh)
            )
            found = jax.device_get(compute(nnx.to_pure_dict(weights)))
            key["weights"] = {path: int(value) for path, value in found.items()}
            # The computation, without the memory addresses of its functions.
            key["encoder"] = re.sub(" at 0x[0-9a-f]+", "", str(graphdef))
        return json.dumps(key)


def on_one_device() -> contextlib.AbstractContextManager:
    """Return a context in which all is computed on one device, the first of each host."""
    axes = ("data", "fsdp", "tensor")
    kinds = (AxisType.Auto,) * len(axes)
    one = jax.make_mesh((1, 1, 1), axes, axis_types=kinds, devices=jax.local_devices()[:1])
    return jax.set_mesh(one)


def small_images(images: jax.Array) -> jax.Array:
    """Return images uint8 [B, H, W, 3] as float32 [B, PIXELS, PIXELS, 3] in [0, 1]."""
    shape = (len(images), PIXELS, PIXELS, 3)
    return jax.image.resize(images.astype(jnp.float32), shape, "bilinear") / 255


def _identity(source: Source) -> str:
    """Return text that identifies a source: its name, its length, and a hash of some examples."""
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(source) - 1, _SAMPLED).astype(int)):
        example = source[int(index)]
        image = example["image"]
        digest.update(image if isinstance(image, bytes) else image.tobytes())
        digest.update(f"{example['id']} {example['label']}".encode())
    return f"{source}, {len(source)} examples, {digest.hexdigest()}"


def _read(path: Path, key: str) -> Labelled | None:
    """Return the features in the file `path`, or None if it is missing, corrupt or not of `key`."""
    if not path.exists():
        return None
    try:
        with copies.local(path) as own:
            check_stored(own)
            with np.load(own) as file:  # a zip, so reading verifies checksums
                if str(file["key"]) == key:
                    return Labelled(file["features"], file["labels"])
    except Exception as error:  # NumPy and zipfile raise many types on corrupt files
        logging.warning("%s is corrupt (%s); recomputing it.", path, error)
    return None


def _write(path: Path, key: str, found: Labelled) -> None:
    if files.is_url(path):
        with tempfile.TemporaryDirectory() as folder:
            _write(Path(folder, path.name), key, found)
            copies.upload(Path(folder), path.parent)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    with files.naming(path):
        with fresh.open("wb") as file:
            np.savez(file, key=np.array(key), **found._asdict())
        fresh.replace(path)
