"""Command-line arguments and exit statuses that the tools have in common."""

import argparse
import contextlib
import dataclasses
import errno
import inspect
import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cap_pretrain import files, untrusted
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry import console

Command = Callable[[argparse.Namespace], int]


def documented_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser whose --help shows a module's docstring, layout included."""
    summary, _, rest = (doc or "").partition("\n")
    return argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def positive_int(text: str) -> int:
    """Convert an argument to an integer of at least 1, as argparse's `type`."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def local_path(text: str) -> Path:
    """Convert an argument to the path of a local file or folder, as argparse's `type`."""
    if files.is_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL; give the path of a local one.")
    return run_path(text)


def run_path(text: str) -> Path:
    """Convert an argument to the path of a run or of a file in one, local or in a bucket."""
    try:
        return files.place(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def field_help(options: type) -> dict[str, str]:
    """Return what the docstring of a class says about each of its fields, under "Attributes"."""
    section = (inspect.getdoc(options) or "").partition("Attributes:\n")[2]
    found: dict[str, str] = {}
    for line in section.split("\n"):
        if re.match(r"    \w+: ", line):
            name, _, text = line.strip().partition(": ")
            found[name] = text
        elif line.startswith("        ") and found:
            found[name] += f" {line.strip()}"
        else:
            break
    return found


def add_fields(group: argparse._ArgumentGroup, options: type, **defaults: Any) -> None:
    """Add an argument for each field of a dataclass, documented by `field_help`."""
    texts = field_help(options)
    for field in dataclasses.fields(options):
        default = defaults.get(field.name, field.default)
        text = f"{texts[field.name]} Default: {default}.".replace("%", "%%")
        group.add_argument(f"--{field.name}", type=type(field.default), default=default, help=text)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint, what `checkpoints.open` accepts, and --step, a checkpoint of a run."""
    what = (
        "workdir of a run, a checkpoint in it (RUN/checkpoints/STEP), or an exported encoder; "
        "a folder or gs://BUCKET/FOLDER"
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help=what)
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the newest")


def add_figure(parser: argparse.ArgumentParser) -> None:
    """Add --out, the file of a figure."""
    parser.add_argument("--out", required=True, type=local_path, help="output file, *.png or *.svg")


def add_dataset(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add --data and --split, which default to the run's own evaluation data."""
    parser.add_argument("--data", default="", help="dataset or its path; default: the run's own")
    parser.add_argument("--split", default="", help="default: the run's evaluation split")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add IMAGE files, and the dataset to take images from if there are none."""
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image file, or folder of some")
    group = parser.add_argument_group("without IMAGE")
    add_dataset(group)
    group.add_argument("--count", type=positive_int, default=4, help="number of images; default: 4")


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show what is done, and for how long, while the context lasts, on stderr if a terminal."""
    with console.used(sys.stderr) as shown:
        shown.quiet = shown.quiet or not shown.terminal
        with shown.doing(text, say=False):
            yield


def run(
    command: Command,
    args: argparse.Namespace,
    catch: tuple[type[Exception], ...] = (UserError, OSError),
) -> int:
    """Run a command; return its status, or print an error of `catch` on stderr and return 2.

    The status is 75 if a bucket could not be reached, as that of the training program.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return command(args)
    except catch as error:
        message = untrusted.printable(str(error), keep="\n")
        print(f"error: {message}", file=sys.stderr)
        if isinstance(error, OSError) and error.errno == errno.EIO:
            return 75 if files.is_url(str(error.filename)) else 2
        return 2
