"""Paths of run folders: on local disks, and in buckets of Google Cloud Storage (gs://).

`place` makes them, and nothing else does: `pathlib.Path` would turn a URL into a local folder named
`gs:`. Those of buckets are `buckets.BucketPath`, which reads and writes through gcsfs, and which
Orbax takes, too; Orbax's arrays go through TensorStore.
"""

import functools
import importlib.util
import logging
import os
import re
from pathlib import Path
from typing import cast

from cap_pretrain.errors import UserError

_URL = re.compile(r"([A-Za-z][\w.+-]+)://(.*)")
# What `pathlib.Path` makes of a URL.
_MANGLED = re.compile(r"(gs|gcs|s3|az|abfs|hf|https?|hdfs):/[^/]")
# Patterns for gcsfs and for Google; parts that Orbax would resolve.
_UNFIT = re.compile(r"[*?\[\]{}\\\x00-\x1f]|/\.\.?(?=/|$)")

_REASONS = {
    "s3": "Orbax, which writes checkpoints, has no S3 (it refuses such paths as not absolute)",
    "gcs": "the URL of a bucket of Google begins with gs://",
}


def place(text: str | os.PathLike[str]) -> Path:
    """Return the path of a run folder, or of something in one, given as a path or gs:// URL.

    The result of a URL has the interface of `pathlib.Path`, too; `is_url` tells them apart.
    Nothing is read. Raises UserError for URLs of other kinds, and if gcsfs is missing.
    """
    name = os.fspath(text)
    found = _URL.match(name)
    if not found:
        if _MANGLED.match(name):
            raise UserError(f"{name}: is a URL with one slash too few; write {_mended(name)}.")
        return Path(name)
    scheme, rest = found.groups()
    if scheme != "gs":
        why = _REASONS.get(scheme, "buckets of Google are supported, gs://")
        raise UserError(
            f"{name}: a run cannot be there: {why}; give a folder or gs://BUCKET/FOLDER."
        )
    if not rest.strip("/").partition("/")[2].strip("/"):
        raise UserError(f"{name}: names no folder in a bucket; give gs://BUCKET/FOLDER.")
    if bad := _UNFIT.search(f"/{rest}"):
        raise UserError(f"{name}: contains {bad[0].strip('/')!r}; give gs://BUCKET/FOLDER without.")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError("a workdir in gs:// needs gcsfs: pip install 'cap_pretrain[gcs]'.")
    os.environ.setdefault("EPATH_USE_TF", "false")  # epath would use it if it is installed
    prepare_gcsfs()
    from cap_pretrain.files.buckets import BucketPath

    return cast(Path, BucketPath(name))


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is in a bucket, whether or not `place` has made it."""
    return bool(_URL.match(os.fspath(path)))


def _mended(name: str) -> str:
    return name.replace(":/", "://", 1)


@functools.cache
def prepare_gcsfs() -> None:
    """Set up gcsfs for run folders and datasets, before anything imports it.

    Its listings are cached without end by default, so that a process would not see what others
    write. Its support for zonal and hierarchical buckets asks a gRPC service about each bucket,
    which needs further permissions, and which endpoints other than Google's lack. All can be set
    otherwise from outside.
    """
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs it raises, too
    import fsspec

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
