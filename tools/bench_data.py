"""Measure the speed of a config's data pipeline and of its stages.

    python tools/bench_data.py --config=configs/pretrain.py --generated=2000 --compare=torch,tf.data

Data are those of the config, or with --generated that many JPEGs: 500 x 375, quality 90, with the
spectrum of photographs (Grain takes up to 0.16 ms per image to shuffle fewer than 1000). Candidates
alternate, with --threads threads or workers each, and do the same on the same JPEGs: read, decode,
crop, resize with antialiasing, flip, batch. Tables show medians; images/s per core use the CPU time
of all threads and workers, so they are also valid on a busy machine. --compare takes torch (a
DataLoader with Pillow), tf.data (fused decode and crop; needs TensorFlow, here or in --tf_python)
and tf.data:aliased (without antialiasing, tf.data's default, which gives worse images).

    python tools/bench_data.py --config=configs/pretrain.py:data=DIR --layouts --compare=webdataset

--layouts writes the examples of the dataset, of JPEGs with captions, as tars and as Parquet, too,
and trains on them as they are (data=wds:, data=parquet:). webdataset is that package's own loader
on the same tars, with Pillow.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grain
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from cap_pretrain import inputs
from cap_pretrain.cli import arguments
from cap_pretrain.data import images, prefetch, views
from cap_pretrain.data.builders import build
from cap_pretrain.data.builders.formats import pairs
from cap_pretrain.data.builders.units import Part
from cap_pretrain.data.sources.base import DEFAULT_FIELDS
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models import build as models
from cap_pretrain.training import feed
from tools import bench_data_layouts, bench_data_rivals
from tools.bench_decode import generated

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py[:key=value,…]")
COMPARE = flags.DEFINE_list("compare", [], "Any of torch, webdataset, tf.data, tf.data:aliased.")
LAYOUTS = flags.DEFINE_bool("layouts", False, "Also train on the examples in tars and Parquet.")
GENERATED = flags.DEFINE_integer("generated", 0, "Number of JPEGs to generate for data.name.")
THREADS = flags.DEFINE_integer(
    "threads", os.cpu_count() or 1, "Threads of each candidate.", lower_bound=1
)
BATCHES = flags.DEFINE_integer("batches", 10, "Batches per round.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of all candidates.", lower_bound=1)
TF_PYTHON = flags.DEFINE_string("tf_python", sys.executable, "A Python that has TensorFlow.")

RIVALS = ("torch", "webdataset", "tf.data", "tf.data:aliased")
SAMPLE = 500
"""Number of examples that stages are timed with."""

MAX_RIVAL_EXAMPLES = 2000
"""Number of examples written for the other libraries."""

Round = dict[str, float]
"""Number of "images", and "wall" and "cpu" time in seconds."""


def generate(count: int, folder: Path) -> Path:
    """Write a dataset of `count` generated photographs with captions and return its folder."""

    def read() -> Iterator:
        for number, file in enumerate(generated(count, 500, 375, 90)):
            caption = f"a generated photograph, number {number}, with detail of all sizes"
            yield pairs.candidate(f"{number}", f"{number}.jpg", [caption], lambda file=file: file)

    def make(**kwargs) -> pairs.Pairs:
        return pairs.Pairs({"train": [Part(read)]}, "tools/bench_data.py", **kwargs)

    return build.build(make, "photographs", folder)[0]


def stages(mixture: inputs.Mixture, tokenizer, config: ConfigDict, dataset) -> dict[str, float]:
    """Return CPU milliseconds per image of one thread, by stage, and "bytes" per image file."""
    source, data = mixture[0][0], config.data
    examples, read = _timed(lambda i: source[i], range(min(len(source), SAMPLE)))
    files = [e["image"] for e in examples if isinstance(e["image"], bytes)]
    rng = np.random.default_rng(0)
    smallest = data.image_size if data.crop == "none" else 0
    _, decode = _timed(lambda file: images.decode(file, smallest), files)
    patch = models.patch_of(config)
    _, square = _timed(
        lambda e: views.prepared(e["image"], data.image_size, data.crop, rng, patch=patch), examples
    )
    texts = [caption for e in examples for caption in e["captions"][:1]]
    _, tokenize = _timed(tokenizer.encode, texts)
    steps = range(max(1, len(examples) // config.batch_size))
    _, whole = _timed(lambda step: dataset[step], steps)
    decode = min(decode, square)  # the pipeline decodes large files partially
    parts = {"read": read, "decode": decode, "augment": square - decode, "tokenize": tokenize}
    parts["batch"] = max(0.0, whole / config.batch_size - sum(parts.values()))
    return parts | {"bytes": sum(map(len, files)) / max(1, len(files))}


def _timed(call: Callable, arguments) -> tuple[list, float]:
    """Return the results of all calls, without broken images, and the CPU milliseconds per call."""
    results, begun = [], time.thread_time()
    for argument in arguments:
        with contextlib.suppress(images.ImageError):
            results.append(call(argument))
    return results, 1e3 * (time.thread_time() - begun) / max(1, len(results))


def ours(dataset: grain.MapDataset, workers: int) -> Callable[[], Round]:
    """Return a function that measures a round of the config's own pipeline."""
    ahead = max(THREADS.value, workers)
    batches = prefetch.iterate(dataset, workers=workers, threads=THREADS.value, prefetch=ahead)
    arrays = (batch["image"] for batch in batches)
    return lambda: bench_data_rivals.measure(arrays, BATCHES.value, 2 * ahead)


@contextlib.contextmanager
def rival(kind: str, folder: Path, config: ConfigDict) -> Iterator[Callable[[], Round]]:
    """Give a function that measures a round of one of RIVALS on a folder, in a subprocess.

    Raises UserError if its library is not installed, or the subprocess failed.
    """
    python = TF_PYTHON.value if kind.startswith("tf.data") else sys.executable
    options = {
        "kind": kind,
        "folder": str(folder),
        "size": config.data.image_size,
        "crop": config.data.crop,
        "flip": config.data.flip,
        "antialias": not kind.endswith(":aliased"),
        "batch_size": config.batch_size,
        "threads": THREADS.value,
        "batches": BATCHES.value,
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [python, bench_data_rivals.__file__, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1"},
            text=True,
        )

        def measure_round() -> Round:
            with contextlib.suppress(BrokenPipeError):
                print(file=process.stdin, flush=True)
            if line := process.stdout.readline():
                return json.loads(line)
            if process.wait() == 3:
                extra = "torch" if kind == "torch" else "bench"
                raise UserError(
                    f"--compare={kind}: {python} lacks it; pip install 'cap_pretrain[{extra}]', or "
                    "for tf.data name a Python that has TensorFlow: --tf_python."
                )
            log.seek(0)
            lines = log.read().strip().splitlines() or [f"exit code {process.returncode}"]
            raise UserError(f"--compare={kind}: it failed: {lines[-1]}")

        try:
            yield measure_round
        finally:
            process.kill()
            process.communicate()


def write_jpegs(mixture: inputs.Mixture, folder: Path) -> None:
    """Write JPEGs of the first dataset as files; raise UserError for images of another format."""
    source = mixture[0][0]
    for i in range(min(len(source), MAX_RIVAL_EXAMPLES)):
        data = source[i]["image"]
        if not (isinstance(data, bytes) and data.startswith(b"\xff\xd8")):
            raise UserError(
                f"--compare: needs JPEGs, but {source} has other images; add --generated=2000."
            )
        (folder / f"{i:06}.jpg").write_bytes(data)


def check_options(config: ConfigDict) -> None:
    """Raise UserError if --compare is unknown or cannot be combined with the config."""
    for kind in COMPARE.value:
        if kind not in RIVALS:
            raise UserError(f"--compare: there is no {kind!r}.{did_you_mean(kind, RIVALS)}")
    if COMPARE.value and config.data.crop not in ("none", "random"):
        raise UserError(
            f"--compare: not supported with data.crop={config.data.crop}; use none or random."
        )


def measure_all(config: ConfigDict) -> tuple[ConfigDict, dict[str, float], dict[str, list[Round]]]:
    """Return the completed config, the result of `stages`, and the rounds of each pipeline."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if GENERATED.value:
            config.data.name = str(generate(GENERATED.value, folder))
            config.data.fields.update(DEFAULT_FIELDS)
            config.data.split = "train"
        mixture = inputs.open_sources(config)
        config = inputs.completed(config, mixture)
        tokenizer = inputs.prepare_tokenizer(config, mixture, folder, anew=True)
        grouped = feed.in_buckets(config, mixture, tokenizer)
        dataset = feed.training_batches(config, grouped, tokenizer)
        with ThreadPoolExecutor(1) as thread:  # where memory is kept as in the pipeline
            parts = thread.submit(stages, mixture, tokenizer, config, dataset).result()
        candidates = {"cap_pretrain": ours(dataset, config.data.workers)}
        if LAYOUTS.value or "webdataset" in COMPARE.value:
            bench_data_layouts.write(mixture[0][0], folder)
        for layout in bench_data_layouts.LAYOUTS if LAYOUTS.value else ():
            other = bench_data_layouts.opened(config, layout, folder, tokenizer)
            candidates[layout] = ours(other, config.data.workers)
        if set(COMPARE.value) - {"webdataset"}:
            (folder / "jpegs").mkdir()
            write_jpegs(mixture, folder / "jpegs")
        for kind in COMPARE.value:
            where = folder / ("wds" if kind == "webdataset" else "jpegs")
            candidates[kind] = stack.enter_context(rival(kind, where, config))
        rounds = {name: [] for name in candidates}
        for number, (name, take) in itertools.product(range(ROUNDS.value + 1), candidates.items()):
            measured = take()
            if number:  # the first round is a warm-up
                rounds[name].append(measured)
    return config, parts, rounds


def run(config: ConfigDict) -> dict:
    """Measure everything, print tables, and return the results."""
    check_options(config)
    config, parts, rounds = measure_all(config)
    size = parts.pop("bytes")
    print("| stage | ms/image, one core |\n|---|---|")
    for stage, milliseconds in parts.items():
        print(f"| {stage} | {milliseconds:.3f} |")
    print("\n| pipeline | images/s | images/s per core | ours to it | per core |")
    print("|---|---|---|---|---|")
    rows = {}
    for name, taken in rounds.items():
        rates = {
            by: statistics.median(r["images"] / r[by] for r in taken) for by in ("wall", "cpu")
        }
        ratios = {
            by: statistics.median(
                mine["images"] / mine[by] / (r["images"] / r[by])
                for mine, r in zip(rounds["cap_pretrain"], taken, strict=True)
            )
            for by in ("wall", "cpu")
        }
        rows[name] = {"rate": rates["wall"], "per_core": rates["cpu"], "ratio": ratios}
        print(
            f"| {name} | {rates['wall']:.0f} | {rates['cpu']:.0f} "
            f"| {ratios['wall']:.2f} | {ratios['cpu']:.2f} |"
        )
    return {
        "crop": config.data.crop,
        "size": config.data.image_size,
        "threads": THREADS.value,
        "workers": config.data.workers,
        "bytes_per_image": size,
        "bytes_per_second": size * rows["cap_pretrain"]["rate"],
        "stages_ms": parts,
        "pipelines": rows,
    }


def _run(_: argparse.Namespace) -> int:
    if CONFIG.value is None:
        raise UserError("--config is missing; add --config=configs/NAME.py.")
    print(json.dumps(run(CONFIG.value)))
    return 0


def main(_: list[str]) -> int:
    """Run the tool and return its exit status."""
    logging.set_verbosity(logging.WARNING)
    return arguments.run(_run, argparse.Namespace(), catch=(UserError,))


if __name__ == "__main__":
    app.run(main)
