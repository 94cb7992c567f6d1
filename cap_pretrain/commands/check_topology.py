r"""Predict memory and step time of a config on TPUs or GPUs with their compilers, without either.

    cap check --config=configs/pretrain.py:objective=cap,model=B/16 \
        --topology=v5e:16x16 [--config.batch_size=16384 …]
    cap check --config=… --topology=h100:8    # or h100:4x8, hosts x GPUs each

Compiles the training step and prints memory per chip or GPU, collectives and a predicted step time.
Nothing is measured. It needs `pip install -e '.[tpu]'`, or '.[cuda]' for GPUs, some minutes and a
few GiB of memory. Model FLOPs, and thus MFU, are counted from the traced program without
rematerialization. cap_pretrain/telemetry/flops.py has peaks, bandwidths and clocks.

TPUs (v4, v5e, v5p, v6e): the time is the sum over operations of the compiler's estimated cycles,
times the trip counts of enclosing loops, by the clock rate; plus, where the core waits for
collectives or copies from HBM, their bytes by the bandwidth. GPUs (a100-40, a100-80, h100, h200,
b200, rtx6000pro, a6000): the compiler estimates nothing, so each operation takes the larger of its
bytes over 85% of the bandwidth and its FLOPs over 75% of the peak; collectives go over NVLink
(or PCIe) within a host and over --network between hosts.

--what compiles inference instead of a step: greedy and beam write captions, compare scores 16 texts
per image, features runs the encoder. It prints the bytes and time of each token and each image.

If the config does not fit, the tool reports by how much, tries options that reduce memory, and
names the fastest one that fits; --fit tries them in any case. --scan=16,64,256,1024 grows the slice
with the same batch per chip (weak scaling), or the number of hosts, with as many GPUs each. A v5e
or v6e slice has at most 256 chips; more are several slices, and the predicted time excludes the
data center network between them. Exit status: 0 it fits; 1 it does not; 2 the user's mistake.
"""

import argparse
import json
import sys
from pathlib import Path

from cap_pretrain import files
from cap_pretrain.cli import arguments
from cap_pretrain.errors import UserError
from cap_pretrain.topology import compilers


def run(args: argparse.Namespace, overrides: list[str]) -> int:
    """Compile, print and write the report, and return the exit status."""
    compiler = compilers.compiler_of(args.topology)
    if args.network is not None and (args.network <= 0 or compiler.device != "GPU"):
        raise UserError(f"--network: {args.network:g} is not a positive rate of GPUs, in Gb/s.")
    compiler.network = args.network or type(compiler).network
    if args.what != "step" and (args.scan or args.fit or args.breakdown):
        raise UserError("--what: --scan, --fit and --breakdown are for the training step.")
    compiler.set_environment()  # before JAX is imported
    from cap_pretrain.sweeps.trials import Trial, parse_overrides
    from cap_pretrain.topology import compile as compiling
    from cap_pretrain.topology import report, search

    trial = Trial(args.config, args.config, parse_overrides(overrides))
    resolved = trial.resolved()
    devices = compiler.open(args.topology, args.slices)
    config, vocab_size = compiling.prepare(resolved, devices)
    if args.what != "step":
        from cap_pretrain.topology import inference

        with arguments.waiting(f"Compiling for {args.topology}"):
            found = [inference.check(config, vocab_size, args.what, devices)]
        print(inference.text(found[0]))
        _write(args.json, found)
        return 0 if found[0]["fits"] else 1
    if args.scan:
        found = search.scan(config, vocab_size, args.topology, args.scan, say=_progress)
        each = f"{found[0]['batch_per_chip']:g} examples per {compiler.device}"
        print(f"Weak scaling, {each}. Predicted:")
        print(report.table(found))
    else:
        with arguments.waiting(f"Compiling for {args.topology}"):
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
    _write(args.json, found)
    return 0 if found[0]["fits"] else 1


def _write(path: Path | None, found: list) -> None:
    if path:
        files.write_text(path, json.dumps(found, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status (see above)."""
    args, overrides = _parse(argv)
    return arguments.run(lambda args: run(args, overrides), args, catch=(UserError,))


def _parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("--config", required=True, help="configs/NAME.py[:key=value,…]")
    parser.add_argument("--topology", required=True, help="such as v5e:16x16 or h100:8")
    parser.add_argument("--slices", type=int, default=1, help="number of TPU slices; default: 1")
    parser.add_argument(
        "--network", type=float, help="Gb/s that one GPU sends to other hosts; default: 400"
    )
    parser.add_argument(
        "--what",
        choices=("step", "greedy", "beam", "compare", "features"),
        default="step",
        help="the training step, or a batch of inference; default: step",
    )
    parser.add_argument("--scan", type=_numbers, help="numbers of devices, as 16,64,256,1024")
    parser.add_argument("--fit", action="store_true", help="search for the fastest fitting options")
    parser.add_argument("--breakdown", action="store_true", help="show time by kind of operation")
    parser.add_argument("--json", type=arguments.local_path, help="write the reports to this file")
    return parser.parse_known_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
