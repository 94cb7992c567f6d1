"""Compiled programs kept on disk (`config.compile_cache`), so that a restart need not compile.

JAX keeps them: host 0 writes each program that took a second to compile (JAX's default), all hosts
read, and an entry that cannot be read costs a warning and a compilation. Its key is a hash of the
program, the compiler's version and options, and the kind of devices. This module chooses the
folder and looks after it.

An entry is machine code, and reading it runs it. So the folder that "auto" chooses lies beside
workdirs, not in one, which may come from a stranger; it must belong to the user and be closed to
others, which a bucket does not say; and no config.json names a folder (docs/security.md).
"""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
from jax._src import cache_key  # its hook and how JAX compresses have no public names
from jax._src import compilation_cache as jax_cache
from ml_collections import ConfigDict

from cap_pretrain import files
from cap_pretrain.distributed import cluster

FOLDER = ".compile_cache"
OFF = ("", "off")

MAX_BYTES = 8 * 2**30
"""Bytes of entries to keep; the oldest beyond are removed at the start of a run.

A training step has 1 to 100 MB. JAX has a limit of its own, jax_compilation_cache_max_size, but
with it every host writes, and takes a lock that it gives up after ten seconds.
"""

NEWEST = 16
"""How many of the newest entries are read at the start to see whether they are whole.

JAX does not write atomically, so a process that is killed leaves part of an entry, which would not
be replaced. It is one of the newest.
"""


def use(config: ConfigDict, workdir: Path, say: Callable[[str], None] = print) -> None:
    """Have JAX keep compiled programs as `config.compile_cache` says. All hosts must call it.

    A folder that JAX's own settings name (`JAX_COMPILATION_CACHE_DIR`) is left in place. A folder
    that cannot be used costs a line, not the run. Call it before the first program that takes long
    to compile.

    Args:
        config: the config of the run.
        workdir: its workdir, beside which "auto" keeps programs on GPUs and TPUs.
        say: receives a line about the folder.
    """
    setting, platform = config.compile_cache, jax.default_backend()
    if platform == "gpu":
        _make_keys_lasting(config)
    if setting in OFF or (setting == "auto" and platform == "cpu"):
        return
    users = jax.config.values["jax_compilation_cache_dir"]
    has_own = bool(users) or "JAX_COMPILATION_CACHE_DIR" in os.environ
    if has_own and setting != "auto":
        say(f"compile_cache: JAX's own setting, {users!r}, replaces {setting!r}.")
    automatic = setting == "auto"
    if automatic and files.is_url(workdir):
        if not has_own:
            say(
                "compile_cache: programs are not kept, since they are machine code, and others may "
                "be able to write to the bucket; name a folder that only you may write to, such as "
                "--config.compile_cache=gs://BUCKET/compiled."
            )
        return
    if setting.startswith("gs://"):
        files.place(setting)  # prepares what JAX opens it with

    def decide(others: list[bool]) -> str:
        if any(others):
            return ""
        if files.is_url(setting):  # JAX opens it
            return setting
        path = workdir.absolute().parent / FOLDER if automatic else Path(setting).expanduser()
        return _prepared(path, automatic, say)

    folder = cluster.decided(has_own, decide)
    if not folder:
        return
    # A host that compiles while others read could keep these waiting.
    if not cluster.decided(_is_usable(folder, automatic), all):
        say(f"compile_cache: {folder} is not used, since not every host can read it.")
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    say(f"Compiled programs are kept in {folder}.")


def _is_usable(folder: str, own: bool) -> bool:
    """Return whether this host finds the folder that host 0 has prepared; see `_prepared`."""
    if files.is_url(folder):
        return True
    path = Path(folder)
    return path.is_dir() and (not own or _is_ours(path))


def _make_keys_lasting(config: ConfigDict) -> None:
    """Give a program with cuDNN's attention the same key in every process.

    On several GPUs the program names the Python object that partitions the attention by its
    address, and JAX hashes that unless a setting forbids it. The object holds what the program does
    not say otherwise, as how the attention is masked. That follows from the model and this code,
    which are hashed instead.
    """
    about = {name: config[name].to_dict() for name in ("learner", "model")}
    about |= {"code": cluster.code_fingerprint(), "deterministic": config.deterministic}
    text = json.dumps(about, sort_keys=True)
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", True)
    cache_key.custom_hook = lambda: text


def _prepared(folder: Path, own: bool, say: Callable[[str], None]) -> str:
    """Create and tidy the folder; return its path, or "" if it must not or cannot be used.

    Args:
        folder: the folder.
        own: it was not named by the user, so that what is in it may be anyone's.
        say: receives a line if programs cannot be read or written there.
    """
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        if own and not _is_ours(folder):
            say(
                f"compile_cache: {folder} is not used, since others own it or may write to it, and "
                f"it holds machine code; --config.compile_cache={folder} uses it all the same."
            )
            return ""
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"to check that there is space")
    except OSError as error:
        say(
            f"compile_cache: cannot write to {folder} ({error.strerror}); programs are compiled at "
            "each start. Name another folder, or off."
        )
        return str(folder) if folder.is_dir() and not own else ""
    _tidy(folder, say)
    return str(folder)


def _is_ours(folder: Path) -> bool:
    """Return whether it is a folder, not a link, that only this user may write to."""
    status = os.lstat(folder)
    closed = not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and closed


def _tidy(folder: Path, say: Callable[[str], None]) -> None:
    """Remove entries that a killed process has not finished, and the oldest beyond MAX_BYTES."""
    entries = []
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another run may remove it
            status = path.stat()
            entries.append((status.st_mtime, status.st_size, path))
    total = 0
    for number, (_, size, path) in enumerate(sorted(entries, reverse=True)):
        total += size
        with contextlib.suppress(OSError):
            damaged = number < NEWEST and not _is_whole(path.read_bytes())
            if damaged or total > MAX_BYTES:
                path.unlink()
                total -= size
            if damaged:
                say(f"compile_cache: removed {path}, which is not whole.")


def _is_whole(entry: bytes) -> bool:
    """Return whether an entry can be decompressed, if JAX would compress it in the same format."""
    if entry[:1] != jax_cache.compress_executable(b"")[:1]:
        return bool(entry)
    try:
        jax_cache.decompress_executable(entry)
    except Exception:
        return False
    return True
