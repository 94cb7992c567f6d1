"""The program `cap`: finds a command in `REGISTRY`, imports its module and runs it."""

import importlib
import itertools
import os
import sys

import cap_pretrain
from cap_pretrain.commands import REGISTRY
from cap_pretrain.errors import did_you_mean


def main(argv: list[str] | None = None) -> int:
    """Run `cap COMMAND …` and return its exit status; 2 if there is no such command."""
    try:
        status = _run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as by `cap … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"cap_pretrain {cap_pretrain.__version__}")
        return 0
    name, *rest = argv
    by_module = {command.module: command for command in REGISTRY.values()}
    command = REGISTRY.get(name) or by_module.get(name)
    if not command:
        print(f"cap: there is no command {name!r}.{did_you_mean(name, REGISTRY)}", file=sys.stderr)
        return 2
    sys.argv = [f"cap {name}", *rest]  # argparse and absl name the program in their messages
    return importlib.import_module(f"cap_pretrain.commands.{command.module}").main(rest)


def overview() -> str:
    """Return the text of `cap --help`: all commands with their purposes, by group."""
    width = max(map(len, REGISTRY))
    lines = ["usage: cap COMMAND …", "", "Pretrain vision encoders by captioning."]
    for group, items in itertools.groupby(REGISTRY.items(), lambda item: item[1].group):
        lines += ["", f"{group}:"]
        lines += [f"  {name:{width}}  {command.purpose}" for name, command in items]
    return "\n".join([*lines, "", "`cap COMMAND --help` shows the options of a command."])
