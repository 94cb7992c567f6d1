"""Check that two workdirs hold bit-identical checkpoints and the same logged metrics.

    cap compare runs/a runs/b [--only_losses_within 1e-4]

Compares metrics.jsonl (except times and `spike/…`) and every array of the checkpoints in common:
parameters, other variables, moving average, optimizer state; or losses alone, for a run on another
mesh or machine, which rounds differently. Of runs/a/checkpoints/300, only that checkpoint is
compared. Exit status: 0 the same; 1 different, with the first
metric and the first array that differ, and by how much; 2 they cannot be compared.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from cap_pretrain import untrusted
from cap_pretrain.checkpoints import folders, stored
from cap_pretrain.checkpoints.manifest import CorruptCheckpointError
from cap_pretrain.checkpoints.open import run_at
from cap_pretrain.cli import arguments
from cap_pretrain.errors import UserError

NOT_COMPARED = ("time/", "spike/")
"""Prefixes of metrics that differ between runs with equal results."""

Metrics = dict[int, dict[str, float | None]]
"""Values by step and name; None is a non-finite value."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The result of comparing two runs."""

    differences: tuple[str, ...]  # one line per kind; empty if the runs are the same
    compared: str  # how much was compared, in words


def compare(
    a: Path,
    b: Path,
    only_losses_within: float | None = None,
    steps: tuple[int | None, int | None] = (None, None),
) -> Comparison:
    """Compare workdirs; raises UserError if one is corrupt or no checkpoint is in common.

    `only_losses_within`, a relative difference, is for losses only; metrics `data/…` stay exact.
    With `steps`, only these two checkpoints are compared; None is the step of the other.
    """
    if any(step is not None for step in steps):
        of_a, of_b = (next(s for s in (own, *steps) if s is not None) for own in steps)
        difference, sizes = _compare_checkpoint((a, of_a), (b, of_b))
        return Comparison((difference,) * bool(difference), f"two checkpoints, {sizes}")
    first, second = read_metrics(a), read_metrics(b)
    if only_losses_within is not None:
        selected = _losses_and_data(first), _losses_and_data(second)
        return _compare_metrics(*selected, only_losses_within)
    found = [_compare_metrics(first, second, 0.0), _compare_checkpoints(a, b)]
    return Comparison(
        tuple(line for part in found for line in part.differences),
        "; ".join(part.compared for part in found),
    )


def read_metrics(workdir: Path) -> Metrics:
    """Read a run's metrics except times and spikes; raises UserError if absent or corrupt.

    A metric logged twice at one step appears the second time as "NAME again".
    """
    path = workdir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{workdir}: is not the workdir of a run (it has no {path.name}).")
    lines = untrusted.read_bounded(path).decode("utf-8", "replace").splitlines()
    metrics: Metrics = {}
    for number, text in enumerate(lines, 1):
        where = f"{path}, line {number}"
        line = untrusted.parse_json(text, where)
        at_step = metrics.setdefault(untrusted.entry(line, "step", int, where), {})
        del line["step"]
        for name, value in line.items():
            untrusted.checked(value, name, (int, float, type(None)), where)
            if not name.startswith(NOT_COMPARED):
                while name in at_step:
                    name += " again"
                at_step[name] = value
    return {step: at_step for step, at_step in metrics.items() if at_step}


def _losses_and_data(metrics: Metrics) -> Metrics:
    def selected(name: str) -> bool:
        return name.startswith("data/") or name.rpartition("/")[2].startswith("loss")

    return {
        step: {name: value for name, value in at_step.items() if selected(name)}
        for step, at_step in metrics.items()
    }


def _compare_metrics(a: Metrics, b: Metrics, tolerance: float) -> Comparison:
    differing = []
    common = sorted(a.keys() & b.keys())
    for step in common:
        x, y = a[step], b[step]
        for name in sorted(x.keys() | y.keys()):
            if name not in x or name not in y:
                differing.append(f"step {step}: {name} is logged in {'AB'[name in y]} only")
            elif not _same_value(x[name], y[name], 0.0 if name.startswith("data/") else tolerance):
                differing.append(f"step {step}: {name} {_both(x[name], y[name])}")
    count = sum(len(a[step].keys() & b[step].keys()) for step in common)
    differences = []
    if differing:
        differences.append(f"metrics: {differing[0]}; {len(differing)} differ, {count} compared")
    for run, only in (("A", a.keys() - b.keys()), ("B", b.keys() - a.keys())):
        if only:
            first = sorted(only)[:5]
            steps = ", ".join(map(str, first)) + ", …" * (len(only) > len(first))
            differences.append(f"metrics: logged in {run} only: {len(only)} steps ({steps})")
    return Comparison(tuple(differences), f"{count} metrics of {len(common)} steps")


def _same_value(x: float | None, y: float | None, tolerance: float) -> bool:
    if x is None or y is None or not tolerance:
        return repr(x) == repr(y)  # distinguishes -0.0 from 0.0
    return abs(x - y) <= tolerance * max(abs(x), abs(y))


def _both(x: float | None, y: float | None) -> str:
    if x is None or y is None:
        return " and ".join("not finite" if value is None else repr(value) for value in (x, y))
    relative = abs(x - y) / max(abs(x), abs(y), sys.float_info.min)
    return f"{x!r} and {y!r}, difference {abs(x - y):.3g} (relative {relative:.2g})"


def _compare_checkpoints(a: Path, b: Path) -> Comparison:
    steps_a, steps_b = (folders.saved_steps(workdir) for workdir in (a, b))
    common = sorted(set(steps_a) & set(steps_b))
    if not common:
        raise UserError(
            f"no checkpoint in common: {a} has steps {steps_a or 'none'}, "
            f"{b} has {steps_b or 'none'}."
        )
    differences = []
    for step in tqdm(common, unit="checkpoint", disable=None):
        difference, sizes = _compare_checkpoint((a, step), (b, step))
        if difference:
            differences.append(difference)
            break
    if steps_a[-1] != steps_b[-1]:
        differences.append(f"last checkpoint: of step {steps_a[-1]} in A, {steps_b[-1]} in B")
    compared = f"{len(common)} checkpoints (the last of step {common[-1]}), {sizes}"
    return Comparison(tuple(differences), compared)


def _compare_checkpoint(a: tuple[Path, int], b: tuple[Path, int]) -> tuple[str, str]:
    """Compare checkpoints (workdir, step); return what differs, or "", and their sizes in words."""
    x, y = _load(*a), _load(*b)
    sizes = f"each {len(x)} arrays of {sum(array.size for array in x.values()):,} numbers"
    differing = [name for name in {**x, **y} if not _same_array(x.get(name), y.get(name))]
    if not differing:
        return "", sizes
    what = _array_difference(x.get(differing[0]), y.get(differing[0]))
    steps = f"{a[1]}" if a[1] == b[1] else f"{a[1]} and {b[1]}"
    return (
        f"checkpoint {steps}: {differing[0]} {what}; {len(differing)} arrays differ, "
        f"{len(x.keys() & y.keys())} compared"
    ), sizes


def _load(workdir: Path, step: int) -> Mapping[str, np.ndarray]:
    try:
        return stored.load_arrays(workdir, step)
    except CorruptCheckpointError as e:
        raise UserError(str(e)) from e


def _same_array(x: np.ndarray | None, y: np.ndarray | None) -> bool:
    if x is None or y is None or (x.dtype, x.shape) != (y.dtype, y.shape):
        return False
    return not np.any(_bits(x) != _bits(y))


def _array_difference(x: np.ndarray | None, y: np.ndarray | None) -> str:
    if x is None or y is None:
        return f"is in {'AB'[x is None]} only"
    if (x.dtype, x.shape) != (y.dtype, y.shape):
        return f"is {x.dtype}{list(x.shape)} and {y.dtype}{list(y.shape)}"
    differing = _bits(x) != _bits(y)
    with np.errstate(invalid="ignore"):  # there may be infinities and NaN
        distance = np.abs(np.subtract(*(v.ravel()[differing].astype(np.float64) for v in (x, y))))
    return f"differs in {differing.sum()} of {x.size} elements, by {distance.max():.3g} at most"


def _bits(x: np.ndarray) -> np.ndarray:
    """Return an array's bits as unsigned integers [size]: NaN can equal NaN, -0.0 is not 0.0."""
    return np.ascontiguousarray(x).reshape(-1).view(f"u{x.dtype.itemsize}")


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status (see above)."""
    parser = arguments.documented_parser(__doc__)
    what = "workdir of a run, or one checkpoint of it, as runs/a/checkpoints/300; or its gs:// URL"
    parser.add_argument("a", metavar="A", help=what)
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument(
        "--only_losses_within",
        type=float,
        metavar="REL",
        help="compare only the losses, up to a relative difference, and data/… exactly",
    )
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax warns of metadata that a checkpoint lacks
    return arguments.run(_run, args)


def _run(args: argparse.Namespace) -> int:
    a, b = (run_at(path) for path in (args.a, args.b))
    result = compare(a.workdir, b.workdir, args.only_losses_within, (a.step, b.step))
    if result.differences:
        print(f"different: A is {args.a}, B is {args.b}", *result.differences, sep="\n")
        return 1
    print(f"the same: {result.compared}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
