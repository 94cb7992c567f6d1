"""Commands in the README and in docs/ exist, with their options, configs and config fields."""

import contextlib
import functools
import importlib
import io
import itertools
import re
import shlex
from pathlib import Path

import pytest

from cap_pretrain import config as configs
from cap_pretrain.cli import config_files
from cap_pretrain.commands import REGISTRY

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh|)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Loops and variables of the shell stand for values.
VARIABLE = {"$objective": "cap"}
TRAINS = ("train", "evaluate")  # their options are those of main, and config fields


def commands(page):
    """Yield the words of each command of ours in the code blocks of a page."""
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            for variable, value in VARIABLE.items():
                line = line.replace(variable, value)
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # output, not a command
                continue
            for start, end in _parts(words):
                part = words[start:end]
                if part[:1] == ["cap"]:
                    yield part[1:]
                elif part[:3] == ["python", "-m", "cap_pretrain.main"]:
                    yield ["train", *part[3:]]
                elif part[:1] == ["python"] and part[1:2] and part[1].startswith("tools/"):
                    yield part[1:]


def _parts(words):
    bounds = [
        -1,
        *(i for i, w in enumerate(words) if w in ("&&", ";", "|", "do", "done")),
        len(words),
    ]
    return [(a + 1, b) for a, b in itertools.pairwise(bounds)]


@functools.cache
def help_of(module, *words):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit) as done:
        importlib.import_module(module).main([*words, "--help"])
    assert not done.value.code
    return text.getvalue()


def check_config(words):
    """Check the config of a training command, its arguments and its fields."""
    given = [w.removeprefix("--config=") for w in words if w.startswith("--config=")]
    given += [w for w in words[:1] if not w.startswith("-")]
    text = given[0] if given else ""
    if text.startswith(("small:", "configs/small.py:")):  # looks at the data
        text = re.sub("data=[^,]*", "data=scenes", text)
    config = config_files.config(text) if text else None
    fields = [w.removeprefix("--config.").split("=")[0] for w in words if w.startswith("--config.")]
    for field in fields:
        configs.get(config if config is not None else configs.default(), field)


def check_required(usage, words):
    """Check that the options are given which a usage line has without brackets."""
    given = {w.split("=")[0] for w in words}
    usage = usage.removeprefix("usage: ").partition(" ")[2]  # the program may be called "-c"
    while usage != (usage := re.sub(r"\[[^][]*\]", "", usage)):
        pass
    groups = re.findall(r"\(([^()]*)\)", usage)  # one option of each
    groups += re.findall(r"(?<!\S)--?\w+", re.sub(r"\([^()]*\)", "", usage))
    for group in groups:
        options = re.findall(r"(?<!\S)--?\w+", group)
        assert not options or given & set(options), f"{group} is missing"


def check(words):
    """Raise if a command would not be accepted for its name, options or config."""
    name, *rest = words
    whole = not {"…", "--help"} & set(rest)
    if "…" in rest:
        rest = rest[: rest.index("…")]
    if name.startswith("tools/"):
        assert (ROOT / name).is_file(), name
        if not (ROOT / "cap_pretrain/commands" / name.split("/")[1]).is_file():
            return
        module = name.split("/")[1].removesuffix(".py")
    else:
        assert name in REGISTRY or name.startswith("-"), f"cap {name}"
        if name.startswith("-"):
            return
        module = REGISTRY[name].module
    if "--" in rest:
        check_config(rest[rest.index("--") + 1 :])
        rest = rest[: rest.index("--")]
    if any(w.startswith("--config") for w in rest):
        check_config(rest)
    if module not in TRAINS:
        text = help_of(f"cap_pretrain.commands.{module}")
        if text.splitlines()[0].endswith(" ..."):  # commands within a command
            text = help_of(f"cap_pretrain.commands.{module}", rest[0])
        for word in rest:
            if word.startswith("--") and not word.startswith("--config"):
                assert word.split("=")[0] in text, f"{name} has no option {word}"
        if whole:
            check_required(text.split("\n\n")[0], rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_would_be_accepted(page):
    wrong = []
    for words in commands(page):
        try:
            check(words)
        except (Exception, SystemExit) as error:  # each command is reported
            wrong.append(f"{' '.join(words)}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_a_wrong_command_is_noticed():
    for wrong in (
        ["trian"],
        ["caption", "--beems=3"],
        ["train", "--config=configs/no.py"],
        ["train", "--config=pretrain.py"],
        ["results", "runs/a", "--percent"],
        ["sheet", "--out=a.png"],
    ):
        with pytest.raises((AssertionError, Exception, SystemExit)):
            check(wrong)
