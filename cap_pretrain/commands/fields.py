"""Print the documentation of config fields with their default values.

    cap fields optim
    cap fields data.image_size
    cap fields evals.retrieval     # the options of an evaluator
    cap fields learner.simclr      # the options of a learner
    cap fields warmup              # all fields whose names contain this

`cap train CONFIG --config.FIELD=VALUE` sets a field. The values are those of the default config;
config files change some of them.
"""

import argparse
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from cap_pretrain.cli import arguments
from cap_pretrain.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 no such field."""
    parser = arguments.documented_parser(__doc__)
    what = "field, section, evals.EVALUATOR, learner.LEARNER or part of a name; default: all"
    parser.add_argument("prefix", nargs="?", default="", metavar="PREFIX", help=what)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args([arg.removeprefix("--config.") for arg in argv])
    return arguments.run(_run, args, catch=(UserError,))


def _run(args: argparse.Namespace) -> int:
    print("\n".join(_lines(args.prefix.removeprefix("config.").rstrip("."))))
    return 0


def _lines(prefix: str) -> Iterator[str]:
    """Yield what there is to print; raises UserError if no field matches."""
    from cap_pretrain import evals, learners
    from cap_pretrain.cli import documentation

    sections = documentation.found(prefix)
    if not sections:
        raise UserError(documentation.no_field(prefix))
    for section in sections:
        if section.heading:
            yield _wrapped(section.heading, "") + "\n"
        for entry in section.entries:
            yield from _entry(entry.fields, entry.text)
    if prefix in ("", "optim", "optim.name"):
        yield "Optimizers (optim.name):"
        yield from _table(documentation.of_optimizers())
    if prefix in ("", "learner"):
        yield "Learners (`cap fields learner.NAME` has their options):"
        kinds = {name: learners.learner_class(name) for name in learners.REGISTRY}
        yield from _table({name: documentation.purpose(kind) for name, kind in kinds.items()})
    if prefix in ("", "evals"):
        yield "Evaluators (`cap fields evals.NAME` has their options):"
        kinds = {name: evals.evaluator_class(name) for name in evals.REGISTRY}
        yield from _table({name: documentation.purpose(kind) for name, kind in kinds.items()})


def _entry(fields: dict[str, Any], text: str) -> Iterator[str]:
    for name, value in fields.items():
        yield f"{name} = {_shown(value)}"
    if text:
        yield _wrapped(text[0].upper() + text[1:], "    " if fields else "")
    yield ""


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return (value or '""') if isinstance(value, str) else repr(value)


def _table(said: dict[str, str]) -> Iterator[str]:
    width = max(map(len, said))
    for name, text in said.items():
        yield _wrapped(text, f"  {name:{width}}  ")
    yield ""


def _wrapped(text: str, head: str) -> str:
    columns = min(shutil.get_terminal_size().columns, 100)
    indent = " " * len(head)
    return textwrap.fill(
        text, columns, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False
    )


if __name__ == "__main__":
    sys.exit(main())
