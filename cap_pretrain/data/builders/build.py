"""Builds datasets atomically: only a finished dataset gets its final name."""

import contextlib
import fcntl
import functools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cap_pretrain.data.builders import units
from cap_pretrain.data.builders.base import ImageDataset
from cap_pretrain.data.builders.shuffling import with_plain_files
from cap_pretrain.errors import UserError

_NAME = re.compile(r"[a-z][a-z0-9_]*")  # accepted by TFDS and safe in file names
_LOCK = "lock"


def build(
    make: Callable[..., ImageDataset],
    name: str,
    out: Path,
    overwrite: bool = False,
    workers: int = 1,
    settings: Any = None,
    make_units: Callable[..., None] = units.make_all,
) -> tuple[Path, ImageDataset]:
    """Write a dataset to `out/name/VERSION` in ArrayRecord format.

    All work is done in the hidden sibling `out/.name.building`, which is renamed at the end. An
    interrupted build leaves its finished units there, and the next build resumes from them.

    Args:
        make: returns the builder, called with `name` and `data_dir`; picklable for worker
            processes.
        name: the dataset's name in TFDS, like "my_data".
        out: the folder of datasets (`data_dir` of TFDS).
        overwrite: replace a finished dataset of this name and version.
        workers: number of processes; the resulting dataset does not depend on it.
        settings: all that the builder depends on, as JSON (`units.settings_of`). An interrupted
            build with other settings is not resumed.
        make_units: makes the units; same signature as `units.make_all`.

    Returns the dataset's folder, and the builder with its report. Raises UserError like
    `only_finished`, or if the input is invalid.
    """
    with only_finished(name, out, overwrite) as (built, final):
        work = built.parent.parent
        make_here = functools.partial(make, name=name, data_dir=work)
        builder = make_here()
        parts = {split: builder.parts(split) for split in builder.splits()}
        planned = units.resume(work / units.FOLDER, parts, settings)
        make_units(builder, make_here, planned, work / units.FOLDER, workers)
        # Hide what TFDS prints: it announces a download, into the work folder.
        with contextlib.redirect_stdout(None), with_plain_files():
            builder.download_and_prepare(file_format="array_record")
        builder.write_report(built)
    return final, builder


@contextlib.contextmanager
def only_finished(name: str, out: Path, overwrite: bool = False) -> Iterator[tuple[Path, Path]]:
    """Give a folder to build a dataset in, and rename it to its final path on success.

    Yields the folder, whose last two parts are NAME/VERSION, and the final path. Raises UserError
    if the name is invalid, the dataset exists, or another process is building it.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"--name {name!r}: must be lower-case letters, digits and _, like my_data.")
    version = str(ImageDataset.VERSION)
    final, work = out / name / version, out / f".{name}.building"
    replaced = work / "replaced"
    exists = UserError(f"{final}: exists already; add --overwrite to replace it.")
    if final.exists() and not overwrite:
        raise exists

    def recover() -> None:
        if replaced.exists() and not final.exists():
            replaced.rename(final)  # the last build was killed between the two renames below

    with _work_folder(work, recover):
        if final.exists() and not overwrite:
            raise exists
        built = work / name / version
        yield built, final
        final.parent.mkdir(exist_ok=True)
        if final.exists():
            final.rename(replaced)
        built.rename(final)


@contextlib.contextmanager
def _work_folder(path: Path, recover: Callable[[], None]) -> Iterator[Path]:
    """Lock a work folder for this process, empty it except for units, and remove it at the end.

    Before it is emptied, `recover` takes out what an earlier build has left there.

    It is removed after a UserError, too; other errors leave the units for the next build.
    """
    for own in (path, path / _LOCK, path / units.FOLDER):  # else files elsewhere would be removed
        if own.is_symlink():
            raise UserError(f"{own}: is a symbolic link, not a folder of this program; remove it.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {path.parent}: cannot be written ({error.strerror}).") from error
    with (path / _LOCK).open("w") as lock:
        try:
            # The kernel releases the lock when the process ends, however it ends.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{path}: another process is building this dataset.") from error
        recover()
        for left_over in path.iterdir():
            if left_over.name not in (_LOCK, units.FOLDER):
                is_folder = left_over.is_dir() and not left_over.is_symlink()
                shutil.rmtree(left_over) if is_folder else left_over.unlink()
        try:
            yield path
        except BaseException as error:
            if isinstance(error, UserError) or not (path / units.FOLDER).exists():
                shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(path, ignore_errors=True)
