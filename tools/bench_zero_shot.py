"""Time zero-shot classification by LiT and by caption scoring, with the same encoder.

    python tools/bench_zero_shot.py [--model S/16 --image_size 224 --classes 1000 --images 8]

Both are the evaluator `zero_shot` with random weights and random images, one template and class
names of one word. Each is run on N and on 3 N images, or 32 and 96 N by LiT, after compilation: the
difference gives the time of an image, the rest is what classes cost once. Times are the shortest of
three. The last line is JSON.
"""

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from cap_pretrain import config as configs
from cap_pretrain import learners
from cap_pretrain.cli import arguments
from cap_pretrain.distributed import sharding
from cap_pretrain.evals.base import Context
from cap_pretrain.evals.zero_shot import ZeroShot
from cap_pretrain.models.sizes import Size
from cap_pretrain.training.step import split_learner

LEARNERS = {
    "caption scoring": ("captioner", {}),
    "LiT": ("dual_encoder", {"head": "map"}),
}

MORE = {"caption scoring": 1, "LiT": 32}
"""Images for each one that is asked for, so that all images take long enough to be timed."""


ROUNDS = 3  # of which the fastest counts


class Random:
    """Random images with labels, and class names of one word."""

    def __init__(self, count: int, side: int, classes: int):
        self.class_names = [f"class{k}" for k in range(classes)]
        self._images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)

    def __str__(self):
        return "random"

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = index % len(self.class_names)
        return {"image": self._images[index], "captions": [], "label": label, "id": str(index)}


@dataclasses.dataclass(frozen=True)
class Words:
    """Gives every word a token by its letters."""

    vocab_size: int
    max_len: int
    pad_id: int = 0

    def encode(self, text: str) -> np.ndarray:
        """Return int32 [max_len], padded with 0."""
        ids = [1 + sum(map(ord, word)) % (self.vocab_size - 1) for word in text.split()]
        return np.array((ids + [0] * self.max_len)[: self.max_len], np.int32)


@dataclasses.dataclass(frozen=True)
class On(Context):
    """A context with one dataset."""

    images: Any = None

    def source(self, split: str = "", data: str = "") -> Any:
        """Return the dataset."""
        del split, data
        return self.images


def seconds(args: argparse.Namespace, name: str, templates: str) -> tuple[float, float]:
    """Return the seconds of an image, and those that all classes take once."""
    c = configs.default()
    c.learner = learners.defaults(LEARNERS[name][0], **LEARNERS[name][1])
    c.model.name, c.data.image_size, c.text.length = args.model, args.image_size, args.length
    for field in dataclasses.fields(Size):
        c.model[field.name] = getattr(args, field.name)
    tokenizer, mesh = Words(args.vocab_size, args.length), sharding.make_mesh(c)

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def variables():
        learner = learners.build(c, args.vocab_size, jax.random.key(0))
        return split_learner(learner)[1:]

    graphdef = split_learner(
        nnx.eval_shape(lambda: learners.build(c, args.vocab_size, jax.random.key(0)))
    )[0]
    options = ZeroShot.Options(templates=templates, batch_size=min(64, MORE[name] * args.images))
    taken, least = [], MORE[name] * args.images
    with jax.set_mesh(mesh):
        weights = variables()
        for count in (least, 3 * least):
            images = Random(count, args.image_size, args.classes)
            evaluator = ZeroShot(On(c, graphdef, tokenizer, mesh, images=images), options)
            evaluator(weights)  # compiles
            taken.append(min(_seconds(evaluator, weights) for _ in range(ROUNDS)))
    image = (taken[1] - taken[0]) / (2 * least)
    return image, taken[0] - least * image


def _seconds(evaluator: ZeroShot, weights: Any) -> float:
    start = time.perf_counter()
    evaluator(weights)
    return time.perf_counter() - start


def _run(args: argparse.Namespace) -> int:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        templates = Path(folder, "templates.txt")
        templates.write_text("a photo of a {}.\n")
        for name in LEARNERS:
            image, once = seconds(args, name, str(templates))
            found[name] = {"image": image, "once": once}
            print(f"{name}: {1000 * image:,.1f} ms an image, {once:.2f} s once", flush=True)
    ratio = found["caption scoring"]["image"] / found["LiT"]["image"]
    print(f"LiT is {ratio:,.0f} times as fast for each image, with {args.classes:,} classes")
    print(json.dumps({"seconds": found, "ratio": ratio, "arguments": vars(args)}))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark and return its exit status."""
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("--model", default="S/16", help="a ViT; default: S/16")
    parser.add_argument("--image_size", type=int, default=224, help="pixels; default: 224")
    parser.add_argument("--classes", type=int, default=1000, help="default: 1000")
    parser.add_argument("--images", type=int, default=8, help="N; default: 8")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text; default: 64")
    parser.add_argument("--vocab_size", type=int, default=32_000, help="default: 32000")
    for field in dataclasses.fields(Size):
        parser.add_argument(f"--{field.name}", type=int, default=0, help="of the ViT; 0: its own")
    return arguments.run(_run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
