"""Captions image files with what a run has learned: one line a file, in their order.

    python tools/caption.py --checkpoint runs/cappa photo.jpg scan.tif
    python tools/caption.py --checkpoint runs/cappa --method beam --json *.jpg

A line is the file's name and its caption, or why it has none: "NAME: not captioned: REASON". With
--json it is an object with "image" and "caption" or "error". The newest sound checkpoint is used,
its averaged parameters if there are any.

Exit status: 0 every file has a caption; 1 some have none; 2 there is no captioner to use, or an
option is wrong, and nothing was captioned.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from flax import nnx

from cap_pretrain import rng
from cap_pretrain.data import images, pipeline
from cap_pretrain.decoding import Decoding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.captions import write_captions
from cap_pretrain.pretrained import Learner, load_learner

Captioner = Callable[[np.ndarray], list[str]]


def read(path: str, size: int, crop: str) -> np.ndarray | str:
    """Returns the image as the run saw its own, uint8 [size, size, 3], or why there is none."""
    try:
        return pipeline.square(Path(path).read_bytes(), size, crop)
    except images.ImageError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)


def captioner(learner: Learner, how: Decoding, batch_size: int, seed: int) -> Captioner:
    """Returns a function from at most `batch_size` images [n, S, S, 3] to their captions.

    Raises:
      UserError: the learner writes no captions.
    """
    config, tokenizer, graphdef, variables = learner
    if not hasattr(graphdef.nodes[0].type, "decode_step"):
        raise UserError(
            f"--checkpoint: is one of a {config.learner.name}, which writes no captions."
        )

    @jax.jit
    def write(variables, pixels, keys):
        return write_captions(
            nnx.merge(graphdef, *variables),
            pixels,
            how,
            length=config.text.length,
            eos=tokenizer.eos_id,
            keys=keys,
        )

    done = 0

    def captions(pixels: np.ndarray) -> list[str]:
        nonlocal done
        keys = jax.vmap(lambda i: rng.key(seed, i, "captions"))(done + np.arange(batch_size))
        done += len(pixels)
        # All batches have one shape, so that one program is compiled.
        padding = [(0, batch_size - len(pixels)), *[(0, 0)] * 3]
        tokens = np.asarray(write(variables, np.pad(pixels, padding), keys))
        return [tokenizer.decode(ids) for ids in tokens[: len(pixels)]]

    return captions


def caption_files(
    paths: Sequence[str], captions: Captioner, batch_size: int, size: int, crop: str
) -> Iterator[dict[str, str]]:
    """Yields {"image": path} with a "caption" or an "error" in order of the paths."""
    for start in range(0, len(paths), batch_size):
        batch = [(path, read(path, size, crop)) for path in paths[start : start + batch_size]]
        pixels = [found for _, found in batch if not isinstance(found, str)]
        written = iter(captions(np.stack(pixels)) if pixels else ())
        for path, found in batch:
            if isinstance(found, str):
                yield {"image": path, "error": found}
            else:
                yield {"image": path, "caption": next(written)}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, as said above."""
    args = _parse(argv)
    logging.set_verbosity(logging.ERROR)
    batch_size = min(args.batch_size, len(args.images))
    try:
        given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Decoding)}
        how = Decoding(**given)
        learner = load_learner(args.checkpoint, step=args.step)
        write = captioner(learner, how, batch_size, args.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    data = learner.config.data
    crop = "center" if data.crop == "random" else "none"  # as evaluation has it
    failed = False
    for result in caption_files(args.images, write, batch_size, data.image_size, crop):
        failed |= "error" in result
        told = result.get("caption", f"not captioned: {result.get('error')}")
        line = json.dumps(result, ensure_ascii=False) if args.json else f"{result['image']}: {told}"
        print(line, flush=True)
    return int(failed)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="any image file")
    parser.add_argument("--checkpoint", required=True, type=Path, help="the workdir of a run")
    parser.add_argument("--step", type=int, help="which of its checkpoints; default: the newest")
    parser.add_argument("--json", action="store_true", help="print JSON, an object a line")
    parser.add_argument("--batch_size", type=_positive, default=16, help="default: 16")
    parser.add_argument("--seed", type=int, default=0, help="of --method sample")
    how = parser.add_argument_group("decoding", "see Decoding in cap_pretrain/decoding.py")
    for field in dataclasses.fields(Decoding):
        kind, default = type(field.default), field.default
        how.add_argument(f"--{field.name}", type=kind, default=default, help=f"default: {default}")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
