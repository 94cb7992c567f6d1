"""A run's folder, and small files in it that are either there in whole or not at all."""

import os
import tempfile
from pathlib import Path

from cap_pretrain.errors import UserError


def make_workdir(workdir: Path) -> None:
    """Makes the folder of a run; raises UserError if it cannot be made or written to."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir) as file:
            file.write(b"to see whether there is room")
    except OSError as e:
        raise UserError(
            f"--workdir: cannot write to {str(workdir)!r} ({e.strerror}); name another folder."
        ) from e


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, making its folder; a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
