"""Compare the probe's logistic regression with scikit-learn's on the same features and C.

    python tools/bench_probe.py [--train runs/a/features/A.npz --test runs/a/features/B.npz]

Without files of a probe, features are generated, 10,000 x 768. Both minimize the same objective and
alternate; the table shows medians. Our time includes the transfer to the device, preparation and
fit, as in a probe. Compilation, once for each shape, is reported separately.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from cap_pretrain import untrusted
from cap_pretrain.cli import arguments
from cap_pretrain.errors import UserError
from cap_pretrain.evals.probes import logistic
from cap_pretrain.evals.probes.features import Labelled


class Fit(NamedTuple):
    """A fitted classifier."""

    kernel: np.ndarray  # float [D, K]
    bias: np.ndarray  # float [K]
    iterations: int  # of the optimizer


def generated(count: int, width: int, classes: int, seed: int) -> Labelled:
    """Return features of overlapping classes, with variances falling as 1 / rank as in encoders."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    labels = rng.integers(0, classes, count).astype(np.int32)
    centers = 0.1 * fixed.standard_normal((classes, width))
    rotation, _ = np.linalg.qr(fixed.standard_normal((width, width)))
    features = centers[labels] + rng.standard_normal((count, width))
    features = (features * np.arange(1, width + 1) ** -0.5) @ rotation
    return Labelled(features.astype(np.float32) + 1, labels)


def read(path: str) -> Labelled:
    """Read features saved by a probe; raise UserError if the file cannot be read."""
    try:
        untrusted.check_stored(Path(path))
        with np.load(path) as file:
            return Labelled(file["features"], file["labels"])
    except Exception as error:  # NumPy raises many kinds
        raise UserError(f"{path}: is not a file of features ({error}).") from error


def ours(data: Labelled, c: float) -> Fit:
    """Fit as the evaluator `linear_probe` does, with inverse regularization `c`."""
    classes = int(data.labels.max()) + 1
    start = np.zeros((data.features.shape[1] + 1, classes), np.float32)
    weights = np.ones(len(data.labels), np.float32)
    posed = logistic.pose(*jax.device_put(data))
    found = logistic.minimize(posed, *jax.device_put((weights, np.float32(c), start)))
    theta, mean, iterations = jax.device_get((found.theta, posed.mean, found.iterations))
    return Fit(theta[:-1], theta[-1] - mean @ theta[:-1], int(iterations))


def scikit_learns(tol: float, max_iter: int, threads: int) -> Callable[[Labelled, float], Fit]:
    """Return a function that fits with scikit-learn's LogisticRegression, in float64."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    def fit(data: Labelled, c: float) -> Fit:
        ignore = warnings.catch_warnings(action="ignore")  # convergence warnings
        with ignore, threadpool_limits(threads):
            model = LogisticRegression(C=c, tol=tol, max_iter=max_iter).fit(*data)
        return Fit(model.coef_.T, model.intercept_, int(model.n_iter_[0]))

    return fit


def objective(fit: Fit, data: Labelled, c: float) -> float:
    """Return the objective that both minimize, in float64."""
    logits = data.features.astype(np.float64) @ fit.kernel + fit.bias
    logits -= logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), data.labels]
    return float(c * losses.sum() + 0.5 * np.sum(fit.kernel.astype(np.float64) ** 2))


def main() -> int:
    """Run the tool and return its exit status."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("--train", help="features saved by a probe; default: generated features")
    parser.add_argument("--test", help="features for the accuracy, to go with --train")
    parser.add_argument("--count", type=int, default=10_000, help="number of generated features")
    parser.add_argument("--width", type=int, default=768, help="width of generated features")
    parser.add_argument("--classes", type=int, default=10, help="classes of generated features")
    parser.add_argument("--c", type=float, nargs="+", default=[0.01, 1.0], help="values of C")
    parser.add_argument("--tol", type=float, default=1e-4, help="tolerance of scikit-learn")
    parser.add_argument("--max_iter", type=int, default=10_000, help="limit of scikit-learn")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=sorted({1, os.cpu_count() or 1}),
        help="threads of scikit-learn; on a busy machine more can be slower",
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    return arguments.run(_run, parser.parse_args(), catch=(UserError,))


def _run(args: argparse.Namespace) -> int:
    if bool(args.train) != bool(args.test):
        raise UserError("--train and --test must be given together.")
    if args.train:
        train, test = read(args.train), read(args.test)
    else:
        kind = args.width, args.classes
        train, test = generated(args.count, *kind, seed=1), generated(args.count, *kind, seed=2)
    candidates = {"cap_pretrain": ours} | {
        f"scikit-learn, threads: {threads}": scikit_learns(args.tol, args.max_iter, threads)
        for threads in args.threads
    }
    count, width = train.features.shape
    print(f"{count} x {width} features, {train.labels.max() + 1} classes, {jax.devices()[0]}")
    begin = time.perf_counter()
    ours(train, args.c[0])
    compiling = time.perf_counter() - begin
    print(f"first fit, with compilation: {compiling:.2f} s\n")
    print("| C | | seconds | iterations | objective | top-1 |\n|---|---|---|---|---|---|")
    rows = []
    for c in args.c:
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        fits = {}
        for _ in range(args.rounds):
            for name, fit in candidates.items():
                begin = time.perf_counter()
                fits[name] = fit(train, c)
                seconds[name].append(time.perf_counter() - begin)
        for name, fit in fits.items():
            row = {
                "c": c,
                "name": name,
                "seconds": statistics.median(seconds[name]),
                "iterations": fit.iterations,
                "objective": objective(fit, train, c),
                "top1": float(
                    np.mean(np.argmax(test.features @ fit.kernel + fit.bias, 1) == test.labels)
                ),
            }
            rows.append(row)
            print(
                f"| {c:g} | {name} | {row['seconds']:.2f} | {row['iterations']} "
                f"| {row['objective']:.3f} | {100 * row['top1']:.2f}% |",
                flush=True,
            )
    print(json.dumps({"examples": count, "width": width, "compiling": compiling, "fits": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
