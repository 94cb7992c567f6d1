r"""Predict memory and step time of a config on a TPU slice with the TPU compiler, without TPUs.

    python tools/check_topology.py --config=configs/pretrain.py:objective=cap,model=B/16 \
        --topology=v5e:16x16 [--config.batch_size=16384 …]

Compiles the training step for the chips of a slice and prints HBM per chip, collectives and a
predicted step time. Nothing is measured. It needs `pip install -e '.[tpu]'`, some minutes and a few
GiB of memory. The time is the sum over operations of the compiler's estimated cycles, times the
trip counts of enclosing loops, by the clock rate; plus, where the core waits for collectives or
copies from HBM, their bytes by the bandwidth. Model FLOPs, and thus MFU, are counted from the
traced program without rematerialization. cap_pretrain/telemetry/flops.py has peaks, bandwidths and
clocks.

If the config does not fit, the tool reports by how much, tries options that reduce memory, and
names the fastest one that fits; --fit tries them in any case. --scan=16,64,256,1024 grows the slice
with the same batch per chip (weak scaling). A v5e or v6e slice has at most 256 chips; more are
several slices, and the predicted time excludes the data center network between them. Exit status: 0
it fits; 1 it does not; 2 the user's mistake.
"""

import argparse
import json
import sys
from pathlib import Path

from cap_pretrain import files
from cap_pretrain.cli import arguments
from cap_pretrain.errors import UserError
from cap_pretrain.sweeps.trials import Trial, parse_overrides
from cap_pretrain.topology import compile as compiling


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Compile, print and write the report, and return the exit status."""
    from cap_pretrain.topology import report, search  # these import JAX

    trial = Trial(args.config, args.config, parse_overrides(overrides))
    config, vocab_size = compiling.prepare(trial.resolved())
    if args.scan:
        found = search.scan(config, vocab_size, args.topology, args.scan, say=_progress)
        print(f"Weak scaling, {found[0]['batch_per_chip']:g} examples per chip. Predicted:")
        print(report.table(found))
    else:
        devices = compiling.open_topology(args.topology, args.slices)
        first = report.check(config, vocab_size, args.topology, devices)
        print(report.text(first, args.breakdown))
        found = [first]
        if args.fit or not first["fits"]:
            tried = search.fit(
                config,
                vocab_size,
                args.topology,
                devices,
                first,
                everything=args.fit,
                say=_progress,
            )
            found += tried
            print(f"\n{search.advice(first, tried)}\n{report.table(found)}")
    if args.json:
        files.write_text(args.json, json.dumps(found, indent=2) + "\n")
    return 0 if found[0]["fits"] else 1


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status (see above)."""
    compiling.set_environment()
    args, overrides = _parse(argv)
    return arguments.run(lambda args: run(args, overrides), args, catch=(UserError,))


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("--config", required=True, help="configs/NAME.py[:key=value,…]")
    parser.add_argument("--topology", required=True, help="such as v5e:16x16 or v5p:8x8x8")
    parser.add_argument("--slices", type=int, default=1, help="number of slices; default: 1")
    parser.add_argument("--scan", type=_numbers, help="numbers of chips, as 16,64,256,1024")
    parser.add_argument("--fit", action="store_true", help="search for the fastest fitting options")
    parser.add_argument("--breakdown", action="store_true", help="show time by kind of operation")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    return parser.parse_known_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
