"""Files of vectors of images: written by `cap embed`, searched by `cap search`."""

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from cap_pretrain import files, untrusted
from cap_pretrain.errors import UserError

SUFFIXES = (".npz", ".parquet")

Vectors: TypeAlias = np.ndarray
"""float32 or float16 [N, D]."""


@dataclasses.dataclass(frozen=True)
class Embedded:
    """Vectors of images and where they come from.

    Attributes:
        names: Paths of the N images, as they were given.
        vectors: Their vectors.
        model: Path of the model that computed them.
        identity: Hash of its weights.
        what: Which vectors they are; see `Model.embed`.
    """

    names: list[str]
    vectors: Vectors
    model: str
    identity: str
    what: str

    @property
    def about(self) -> dict[str, str]:
        """The texts that describe the vectors, by name."""
        return {"model": self.model, "identity": self.identity, "what": self.what}


def check_name(path: Path) -> None:
    """Raise UserError unless the name of a file of vectors ends in one of SUFFIXES."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: must end in {' or '.join(SUFFIXES)}.")


def write(path: Path, found: Embedded) -> None:
    """Write vectors to a file whose name is of SUFFIXES, completely or not at all.

    Both kinds hold `name` and `vector`, and a JSON text of `Embedded.about`: the entry `about` of
    an npz, or the metadata of that name of the schema of a parquet file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    names, about = [untrusted.legible(name) for name in found.names], json.dumps(found.about)
    with files.naming(path):
        if path.suffix.lower() == ".npz":
            with fresh.open("wb") as file:
                np.savez(file, name=np.array(names), vector=found.vectors, about=np.array(about))
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            flat = pa.array(found.vectors.reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, found.vectors.shape[1])
            table = pa.table({"name": names, "vector": column}, metadata={"about": about})
            pq.write_table(table, fresh)
        fresh.replace(path)


def read(path: Path) -> Embedded:
    """Read a file that `write` wrote; raises UserError for any other."""
    check_name(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; write it with `cap embed`.")
    with untrusted.parsing(path):
        names, vectors, about = _npz(path) if path.suffix.lower() == ".npz" else _parquet(path)
        if vectors.ndim != 2 or vectors.dtype.kind != "f" or len(names) != len(vectors):
            raise ValueError("it does not hold one vector for each name; write it with `cap embed`")
    described = untrusted.parse_json(about, path)
    texts = (untrusted.entry(described, key, str, path) for key in ("model", "identity", "what"))
    return Embedded(names, vectors, *texts)


def _npz(path: Path) -> tuple[list[str], Vectors, str]:
    untrusted.check_stored(path)
    with np.load(path, allow_pickle=False) as file:
        return [str(name) for name in file["name"]], file["vector"], str(file["about"])


def _parquet(path: Path) -> tuple[list[str], Vectors, str]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["name", "vector"])
    column: Any = table["vector"].combine_chunks()
    flat = column.values.to_numpy(zero_copy_only=False)
    about = (table.schema.metadata or {}).get(b"about", b"{}").decode()
    return table["name"].to_pylist(), flat.reshape(table.num_rows, -1), about


def nearest(vectors: Vectors, query: np.ndarray, top: int) -> list[tuple[int, float]]:
    """Return (index, cosine) of the `top` rows of `vectors` that are nearest to `query` [D]."""
    rows = vectors.astype(np.float32)
    tiny = np.finfo(np.float32).tiny
    norms = np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(query), tiny)
    cosines = rows @ query.astype(np.float32) / norms
    order = np.argsort(-cosines, kind="stable")[:top]
    return [(int(index), float(cosines[index])) for index in order]
