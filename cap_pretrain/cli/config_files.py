"""Find config files by name, in the current folder or as installed, and read what they say.

An installed package has the files of `configs/` in `cap_pretrain/configs` (see setup.py); a
checkout has them beside the package. This module imports neither JAX nor a config file.
"""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import cap_pretrain
from cap_pretrain.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ml_collections import ConfigDict

FOLDER, SWEEPS = "configs", "configs/sweeps"


class ConfigFile(NamedTuple):
    """What the docstring of a config file says."""

    path: Path
    purpose: str  # first sentence
    arguments: list[tuple[str, str]]  # names and descriptions
    text: str  # the whole docstring


def shipped() -> Path:
    """Return the folder `configs` that comes with the package."""
    package = Path(cap_pretrain.__file__).parent
    inside = package / FOLDER
    return inside if inside.is_dir() else package.parent / FOLDER


def find(name: str, folder: str = FOLDER) -> Path:
    """Return the config file that a path, as configs/pretrain.py, or a name, as pretrain, means.

    The current folder comes first, then what comes with the package. A name is looked for in
    `folder` only, so that other files of the user never run. Raises UserError if there is none.
    """
    path = Path(name).expanduser()
    places = [path]
    if path.suffix != ".py":
        places = [Path(f"{path}.py")] if "/" in name else []
        places.append(Path(folder, f"{path}.py"))
    for place in places:
        if place.is_file():
            return place
    for place in places:
        inside = shipped().parent / place
        if not place.is_absolute() and place.parts[0] == FOLDER and inside.is_file():
            return inside
    folders = {Path(folder), path.parent}
    known = [str(place) for own in folders for place in own.glob("*.py")]
    known += [f"{folder}/{place.name}" for place in (shipped().parent / folder).glob("*.py")]
    raise UserError(f"there is no file {name!r}.{did_you_mean(str(places[-1]), set(known))}")


def load(path: Path, function: str) -> Any:
    """Import a function from a Python file; raise UserError if there is none."""
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up here
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise UserError(f"{path}: has no function {function}().")
    return getattr(module, function)


def config(text: str) -> "ConfigDict":
    """Return the config of a text such as "pretrain:objective=cap" or "configs/own.py".

    Raises UserError if there is no such file, or it takes no arguments.
    """
    name, colon, arguments = text.partition(":")
    path = find(name)
    get_config = load(path, "get_config")
    try:
        return get_config(arguments) if colon else get_config()
    except TypeError as error:
        if error.__traceback__ and error.__traceback__.tb_next:  # raised within the file
            raise
        raise UserError(f"config: {text!r} does not fit {path.name} ({error}).") from error


def listed(folder: str = FOLDER) -> list[ConfigFile]:
    """Return the config files of the current folder and those that come with the package."""
    found: dict[str, Path] = {}
    for place in (shipped().parent / folder, Path(folder)):
        found |= {path.name: path for path in sorted(place.glob("[!_]*.py"))}
    return [described(path) for path in found.values()]


def described(path: Path) -> ConfigFile:
    """Read the docstring of a config file without running it."""
    try:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: is not a Python file ({error}).") from error
    arguments: list[tuple[str, str]] = []
    block = re.search(r"^Arguments\b.*:\n((?:  .*\n?)+)", text, re.MULTILINE)
    for line in block[1].splitlines() if block else []:
        name, _, said = line.strip().partition(" ")
        if line.startswith("   "):  # goes on
            arguments[-1] = (arguments[-1][0], f"{arguments[-1][1]} {line.strip()}")
        else:
            arguments.append((name, said.strip()))
    return ConfigFile(path, text.partition("\n")[0], arguments, text)
