r"""Will it fit, and how fast would it be? Asks the TPU compiler, on a machine without TPUs.

    python tools/check_topology.py --config=configs/pretrain.py:objective=cap,model=B/16 \\
        --topology=v5e:16x16 [--config.batch_size=16384 …]

compiles the training step of the config for the chips of a pod and prints HBM per chip, collectives
and a predicted step time. Nothing is measured. What it takes is `pip install -e '.[tpu]'`, some
minutes and a few GiB of memory.

Predicted time: the cycles that the compiler estimates for each operation, times the turns of the
loops around it, over the chip's clock; and where the core waits for collectives or for copies from
HBM, their bytes over the bandwidth. Model FLOPs, and so MFU, are counted from the traced program
without what rematerialisation computes again. Peaks, bandwidths and clocks:
cap_pretrain/telemetry/flops.py.

If it does not fit, it says by how much, tries what would make it fit, and names the fastest of
that; --fit tries them in any case. --scan=16,64,256,1024 keeps the batch per chip and grows the
slice (weak scaling); a v5e or v6e slice ends at 256 chips, so more are several slices, between
which the predicted time does not count the data center network.

Exit status: 0 it fits; 1 it does not; 2 the user's mistake.
"""

import argparse
import json
import sys
from pathlib import Path

from cap_pretrain import files
from cap_pretrain.errors import UserError
from cap_pretrain.sweeps.trials import Trial, parse_overrides
from cap_pretrain.topology import compile as compiling


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Checks, prints, writes."""
    from cap_pretrain.topology import report, search  # which import JAX

    trial = Trial(args.config, args.config, parse_overrides(overrides))
    config, vocab_size = compiling.prepare(trial.resolved())
    if args.scan:
        found = search.scan(config, vocab_size, args.topology, args.scan, say=_progress)
        print(f"Weak scaling, {found[0]['batch_per_chip']:g} examples a chip. Predicted:")
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
    """Returns the exit code."""
    compiling.set_environment()
    try:
        return run(*_parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="configs/NAME.py[:key=value,…]")
    parser.add_argument("--topology", required=True, help="such as v5e:16x16 or v5p:8x8x8")
    parser.add_argument("--slices", type=int, default=1, help="so many of them; default: 1")
    parser.add_argument("--scan", type=_numbers, help="numbers of chips, as 16,64,256,1024")
    parser.add_argument("--fit", action="store_true", help="search for what is fastest and fits")
    parser.add_argument("--breakdown", action="store_true", help="where the time goes")
    parser.add_argument("--json", type=Path, help="write all of it to this file")
    return parser.parse_known_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
