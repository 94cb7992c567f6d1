"""List the configs with their arguments, or describe one.

    cap configs
    cap configs pretrain

`cap train NAME:key=value,…` runs a config, `cap sweep run NAME:key=value,…` a sweep. A config is
looked for in the folder `configs` of the current folder, then among those of the package.
"""

import argparse
import contextlib
import shutil
import sys
import textwrap

from cap_pretrain.cli import arguments, config_files
from cap_pretrain.cli.config_files import FOLDER, SWEEPS, ConfigFile
from cap_pretrain.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 the user's mistake."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="config or sweep to describe")
    return arguments.run(_run, parser.parse_args(argv), catch=(UserError,))


def _run(args: argparse.Namespace) -> int:
    if args.name:
        found = _described(args.name.partition(":")[0])
        print(f"{found.text}\n\nThe file is {found.path}.")
        return 0
    for title, folder in (("Configs", FOLDER), ("Sweeps", SWEEPS)):
        print(f"{title}:")
        for found in config_files.listed(folder):
            print(_entry(found))
        print()
    print("`cap configs NAME` says more; `cap fields` documents the fields that configs set.")
    return 0


def _described(name: str) -> ConfigFile:
    """Return the config of a name, or the sweep; the error is that of a config."""
    try:
        return config_files.described(config_files.find(name))
    except UserError:
        with contextlib.suppress(UserError):
            return config_files.described(config_files.find(name, SWEEPS))
        raise


def _entry(found: ConfigFile) -> str:
    columns = min(shutil.get_terminal_size().columns, 100)
    lines = [f"  {found.path.stem}: {found.purpose}"]
    width = max((len(name) for name, _ in found.arguments), default=0)
    for name, said in found.arguments:
        head = f"      {name:{width}}  "
        lines += textwrap.wrap(
            said, columns, initial_indent=head, subsequent_indent=" " * len(head)
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
