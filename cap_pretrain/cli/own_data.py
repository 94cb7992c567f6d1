"""Train on a folder of photos and a table of their captions, at one go.

    cap train my_photos captions.csv
    cap train my_photos captions.csv --objective clip --workdir runs/clip --config.total_steps=500

The table (CSV, TSV or Parquet) has a row for each caption, with the columns `image` and `caption`
or the names given. A dataset is built in WORKDIR/dataset, and a model is trained with the settings
of configs/small.py. A tenth of the images, with all of their captions, is held out for validation.
The same command resumes an interrupted build or run. Other options are those of a run, such as
--config.some.field=value.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import posixpath
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from cap_pretrain import files
from cap_pretrain.checkpoints.folders import saved_steps
from cap_pretrain.cli import arguments
from cap_pretrain.data.builders import rows
from cap_pretrain.data.builders.build import build
from cap_pretrain.data.builders.files import IMAGE_SUFFIXES, open_files
from cap_pretrain.data.builders.filters import Filters
from cap_pretrain.data.builders.formats import table
from cap_pretrain.data.sources.base import INFO_FILE
from cap_pretrain.errors import UserError
from cap_pretrain.small import config as small
from cap_pretrain.small import facts
from cap_pretrain.telemetry import console

COLUMNS = {
    "image": (
        *("image", "file", "file_name", "filename", "image_name", "image_path", "path", "photo"),
        *("img", "picture", "name"),
    ),
    "caption": ("caption", "captions", "text", "description", "title", "sentence", "comment"),
}
"""Usual names of the columns, from the first choice on; case does not matter."""

RECORD = "own_data.json"
"""In a workdir: what its dataset was built from, and the devices that its settings are for."""


@dataclasses.dataclass(frozen=True)
class Started:
    """The content of RECORD.

    Attributes:
        devices: As for `configs/small.py`.
        source: Paths of photos and table, the names of the columns, and the `_digest` of the files.
    """

    devices: str
    source: dict[str, str]

    @staticmethod
    def read(workdir: Path) -> "Started | None":
        """Return the record of an earlier start; None if there is none, or it is damaged."""
        try:
            found = files.read_json(workdir / RECORD)
            return Started(str(facts.devices_of(found["devices"])), dict(found["source"]))
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None

    def is_of(self, named: Mapping[str, str]) -> bool:
        """Return whether the dataset was built from the files with these paths."""
        return named.items() <= self.source.items()


def prepare(argv: Sequence[str]) -> list[str]:
    """Build the dataset that the arguments of `cap train` name; return those of the run.

    Ends the program after --help. Raises UserError, UnfinishedError or OSError.
    """
    parser = arguments.documented_parser(__doc__)
    parser.allow_abbrev = False
    parser.add_argument("photos", type=arguments.local_path, help="folder or zip of the images")
    what = "CSV, TSV or Parquet with a row for each caption"
    parser.add_argument("table", type=arguments.local_path, help=what)
    parser.add_argument("--workdir", help="folder; default: runs/NAME_OF_THE_FOLDER")
    what = f"what to learn: {', '.join(small.OBJECTIVES)}, or several joined by +; default: cap"
    parser.add_argument("--objective", default="cap", help=what)
    parser.add_argument("--image", default="", help="column of image names; default: found")
    parser.add_argument("--caption", default="", help="column of captions; default: found")
    args, others = parser.parse_known_args(argv)
    small.check_objective(args.objective)
    if files.is_url(args.workdir or ""):
        raise UserError(
            f"--workdir: {args.workdir} is a URL, and a dataset is built in it; give a folder."
        )
    workdir = files.place(args.workdir or f"runs/{_name(args.photos)}").expanduser().absolute()
    dataset = workdir / "dataset" / _name(args.photos)
    if found := {",", "+"} & set(str(dataset)):
        raise UserError(
            f"--workdir: {str(dataset)!r} contains {found.pop()!r}, which separates datasets; "
            "choose a folder without it."
        )
    devices = _built(args, workdir, dataset).devices
    settings = f"data={dataset},objective={args.objective},devices={devices}"
    return [f"--config={small.__file__}:{settings}", f"--workdir={workdir}", *others]


def _name(photos: Path) -> str:
    """Return the name of a dataset for a folder or zip: lower-case letters, digits and _.

    Accents are left out. A digest stands for letters of other scripts, which `build` refuses.
    """
    path = photos.expanduser().absolute()
    full = path.stem if path.suffix.lower() == ".zip" else path.name
    full = unicodedata.normalize("NFKD", full.lower())
    name = re.sub("[^a-z0-9]+", "_", re.sub("[\u0300-\u036f]", "", full)).strip("_")
    if any(letter.isalnum() and not letter.isascii() for letter in full):
        digest = hashlib.sha256(full.encode(errors="surrogateescape")).hexdigest()
        name = f"{name}_{digest[:6]}".strip("_")
    return name if name[:1].isalpha() else f"photos_{name}".rstrip("_")


def _built(args: argparse.Namespace, workdir: Path, dataset: Path) -> Started:
    """Build the dataset, unless an earlier start did; return what to record of this one.

    Raises UserError if photos or table have changed since the run took its first steps.
    """
    earlier = Started.read(workdir)
    names = {"photos": args.photos, "table": args.table}
    named = {name: str(path.expanduser().resolve()) for name, path in names.items()}
    finished = any(dataset.glob(f"*/{INFO_FILE}"))
    there = all(map(os.path.exists, named.values()))
    if earlier and finished and not there and earlier.is_of(named):
        console.say(f"Using {dataset}, because {args.photos} or {args.table} is no longer there.")
        return earlier
    image, caption = _columns(args)
    photos, tables = files.place(named["photos"]), files.place(named["table"])
    digest = _digest(photos, tables, workdir.resolve())
    source = named | {"image": image, "caption": caption, "digest": digest}
    if earlier and finished and earlier.source == source:
        return earlier
    if finished and saved_steps(workdir):
        raise UserError(
            f"{workdir}: {args.photos} or {args.table} has changed since this run began; choose "
            "another --workdir, or remove this one to begin again."
        )
    tfds.disable_progress_bar()  # cap_pretrain shows its own
    # Rows with a URL would be examples of their own, so that an image could be in both parts.
    columns = table.Columns(caption=(caption,), image=image, url="")
    make = functools.partial(
        table.Dataset,
        {"train": tables},
        {"": photos},
        columns,
        filters=Filters(dedup="exact"),
    )
    files.make_workdir(workdir)
    with console.doing(f"Building a dataset from {args.photos} and {args.table}"):
        folder, builder = build(make, dataset.name, dataset.parent, overwrite=True, settings=source)
    report = builder.report["train"].summary()
    console.say(f"{report}\nWritten to {folder}; its report.html lists dropped examples.")
    started = Started(str(facts.present()), source)
    files.write_text(workdir / RECORD, json.dumps(dataclasses.asdict(started), indent=2) + "\n")
    return started


def _digest(photos: Path, table: Path, workdir: Path) -> str:
    """Return a digest of the names, sizes and modification times of images and tables.

    Workdirs in the folder of photos, and other files, have no effect. All paths are resolved.
    """
    found = {str(path): path for path in [*rows.table_files(table), photos]}
    if photos.is_dir():
        del found[str(photos)]
        names = open_files(photos).names()
        runs = {posixpath.dirname(name) for name in names if posixpath.basename(name) == RECORD}
        if workdir.is_relative_to(photos):
            runs.add(workdir.relative_to(photos).as_posix())
        written = tuple(f"{run}/" for run in runs - {"", "."})
        for name in names:
            suffix = posixpath.splitext(name)[1].lower()
            hidden = posixpath.basename(name).startswith(".")
            if suffix in {*IMAGE_SUFFIXES, ""} and not hidden and not name.startswith(written):
                found[name] = photos / name
    stamps = []
    for name, path in found.items():
        try:
            status = path.stat()
            stamps.append((name, status.st_size, status.st_mtime_ns))
        except OSError:  # a link to nothing, which is counted when it is read
            stamps.append((name, -1, -1))
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def _columns(args: argparse.Namespace) -> list[str]:
    """Return the names of the columns of images and captions; raises UserError."""
    path = rows.table_files(args.table.expanduser())[0]
    present = rows.column_names(path, rows.Form())
    by_name = {name.strip().lower(): name for name in reversed(present)}
    found = []
    for column, usual in COLUMNS.items():
        given = getattr(args, column)
        name = given or next((by_name[name] for name in usual if name in by_name), "")
        if not name:
            shown = ", ".join(map(repr, present[:10]))
            raise UserError(
                f"{path}: no column is called {column!r} (found: {shown}); name it with "
                f"--{column}, or give the table a first row with the names of its columns."
            )
        found.append(name)
    return found
