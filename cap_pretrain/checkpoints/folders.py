"""The folders of checkpoints, `WORKDIR/checkpoints/STEP/`, on a disk or in a bucket.

On a disk, Orbax renames a folder when the checkpoint is complete. In a bucket, where the objects of
an unfinished one already have their final names, it writes the object `files.COMMITTED` last, and a
checkpoint counts from then on.
"""

import os
from pathlib import Path
from typing import Any, cast

from cap_pretrain import files

DAMAGED = "damaged.txt"
"""Says in the folder of a bucket that its checkpoint was set aside, and why."""


def checkpoints_folder(workdir: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a workdir's checkpoint folder, which may not exist."""
    return files.place(workdir).absolute() / "checkpoints"


def saved_steps(workdir: str | os.PathLike[str]) -> list[int]:
    """Return the steps that have a checkpoint, ascending, without validating them."""
    folder = checkpoints_folder(workdir)
    if files.is_url(folder):  # in one request
        found = cast(Any, folder).objects(f"*/{files.COMMITTED}")
        names = [name.partition("/")[0] for name in found]
        return sorted(step for name in names if (step := files.number(name)) is not None)
    return sorted(step for step, path in files.numbered(folder).items() if path.is_dir())


def set_aside(workdir: Path, step: int, why: str) -> str:
    """See to it that the checkpoint of `step` no longer counts; return what was done with it.

    On a disk its folder is renamed to `STEP.damaged`, or `STEP.2.damaged` if that exists. In a
    bucket, where that would copy it, the object is removed that says that it is complete.
    """
    folder = checkpoints_folder(workdir) / str(step)
    if not files.is_url(folder):
        name = folder.rename(files.unused(folder.with_name(f"{step}.damaged"))).name
        return f"It is renamed to {name}"
    files.write_text(folder / DAMAGED, why + "\n")
    (folder / files.COMMITTED).unlink(missing_ok=True)
    return f"It is set aside: its {files.COMMITTED} is removed"


def remove_unfinished(workdir: Path) -> None:
    """Remove what an interrupted save has left in a bucket, but not what was set aside.

    On a disk, Orbax does so.
    """
    folder = checkpoints_folder(workdir)
    if files.is_url(folder):
        complete = saved_steps(workdir)
        for step, path in files.numbered(folder).items():
            if step not in complete and not (path / DAMAGED).exists():
                cast(Any, path).rmtree(missing_ok=True)
