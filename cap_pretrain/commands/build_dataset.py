r"""Build a dataset in TFDS format (ArrayRecord) from images and captions, or from class folders.

    cap build captions_json --name my_data --out data \
        --annotations train=captions_train.json.gz val=captions_val.json.gz \
        --images train=images_train.zip val=images_val.zip
    cap build image_folder --name my_classes --out data \
        --images train=train.zip val=val.zip --classes classes.json
    cap build webdataset --name my_data --out data --shards tars
    cap build csv --name my_data --out data --tables a.csv --images photos

Training reads it by its path, `data=data/my_data`. report.html and report.json there count dropped
examples, and dropped.jsonl lists them. The same command resumes an interrupted build.
"""

import argparse
import functools
import importlib
import shlex
import sys
from typing import NoReturn

from cap_pretrain.cli import arguments
from cap_pretrain.data.builders import ALIASES, FORMATS, beam, filters, units
from cap_pretrain.errors import UserError, disk_error

_WITHOUT_EFFECT = ("out", "overwrite", "workers", "beam")
"""Arguments that do not change the contents of a dataset."""


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, because the usage of a format is long."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Build and return the exit status: 0 done, 1 unfinished, 2 user's mistake, 130 interrupted."""
    try:
        return arguments.run(_build, _parse(argv), catch=(UserError,))
    except units.UnfinishedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if not (reason := disk_error(error)):
            raise
        where = error.filename or "--out"
        print(f"error: {where}: {reason}; fix this and run again to resume.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run again to resume", file=sys.stderr)
        return 130


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = _Parser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT")
    for name, description in FORMATS.items():
        sub = formats.add_parser(
            name, aliases=ALIASES.get(name, ()), help=description, description=description
        )
        sub.add_argument("--name", required=True, help="name of the dataset, like my_data")
        sub.add_argument(
            "--out", required=True, type=arguments.local_path, help="written to OUT/NAME/1.0.0"
        )
        sub.add_argument("--overwrite", action="store_true", help="replace a finished dataset")
        workers = "processes that read and check images, without effect on the result; default: 1"
        sub.add_argument("--workers", type=int, default=1, metavar="N", help=workers)
        options = "build units with Apache Beam instead, with options such as --runner=DirectRunner"
        sub.add_argument("--beam", metavar="OPTIONS", help=options)
        filters.add_arguments(sub)
        module = importlib.import_module(f"cap_pretrain.data.builders.formats.{name}")
        module.Dataset.add_arguments(sub)
        sub.set_defaults(dataset=module.Dataset)
    return parser.parse_args(argv)


def _build(args: argparse.Namespace) -> int:
    import tensorflow_datasets as tfds

    from cap_pretrain.data.builders.build import build

    tfds.disable_progress_bar()  # cap_pretrain shows its own
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: must be at least 1.")
    make = functools.partial(
        args.dataset.from_arguments, args, filters=filters.from_arguments(args)
    )
    settings = units.settings_of(
        {name: value for name, value in vars(args).items() if name not in _WITHOUT_EFFECT}
    )
    make_units = units.make_all
    if args.beam is not None:
        make_units = functools.partial(beam.make_all, options=shlex.split(args.beam))
    folder, builder = build(
        make, args.name, args.out, args.overwrite, args.workers, settings, make_units
    )
    for split, report in builder.report.items():
        print(f"{split}: {report.summary()}")
    print(f"written to {folder}; its report.html lists dropped examples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
