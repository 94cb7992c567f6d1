r"""Stores what an encoder makes of the images of a dataset: a dataset of features, to learn from.

    python tools/extract_features.py --encoder runs/cappa --data data/my_data --splits train val \\
        --out data --name my_features --what tokens
    python -m cap_pretrain.main --config=configs/coco_captioning.py:data=data/my_features \\
        --workdir=runs/captions --config.model.name=stored

What is learned from it is what is learned with the encoder frozen and no augmentation, without
decoding and encoding the images again in every epoch. Captions, labels, ids and questions are
copied, in the same order; images that do not decode are left out, and told. --encoder is anything
that --config.encoder takes. OUT/NAME/1.0.0/made.json says which encoder it was.

--what head stores what layers behind the encoder make of an image, in place of the pooled vector:
of a workdir of clip or siglip, the projected embedding; of jigsaw, the last layer before the output
of the network that sees nine tiles.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

import cap_pretrain
from cap_pretrain import config as configs
from cap_pretrain import fingerprint, inputs, learners
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.data.sources.base import Example, Source
from cap_pretrain.data.text.tokenizers import NoText, Tokenizer
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context
from cap_pretrain.evals.inference.portions import EveryImage
from cap_pretrain.learners.protocols import Featurizes
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.training.step import init_state

WHAT = ("pooled", "tokens", "head")
DTYPES = ("float32", "float16")


def encode(learner: nnx.Module, images: jax.Array, what: str, dtype: Any) -> jax.Array:
    """uint8 images [B, H, W, 3] -> [B, 1 + N, D]: one vector and, if asked for, N tokens."""
    if what == "head":
        rows = [learner.features(images)[:, None]]
    else:
        tokens, pooled = learner.encoder(normalize_images(images, jnp.float32))
        rows = [pooled[:, None], tokens] if what == "tokens" else [pooled[:, None]]
    return jnp.concatenate([row.astype(jnp.float32) for row in rows], axis=1).astype(dtype)


def extract(args: argparse.Namespace) -> Iterator[str]:
    """Writes the dataset, in whole or not at all; yields what to tell of it.

    Raises:
      UserError: the user's mistake.
    """
    from cap_pretrain.data.builders.build import only_finished
    from cap_pretrain.data.builders.features import FeatureDataset

    config, beginning = warm_start.resolve(_config(args))
    tokenizer = _tokenizer(config, args.what)
    splits = {split.partition("[")[0]: split for split in args.splits}
    if len(splits) < len(args.splits):
        raise UserError(f"--splits: {' '.join(args.splits)} has two parts of one split.")
    sources = {name: inputs.open_data(config, split) for name, split in splits.items()}
    mesh = sharding.make_mesh(config)
    init, _, graphdef, _ = init_state(
        lambda key: learners.build(config, tokenizer.vocab_size, key),
        lambda params: optax.set_to_zero(),
        config,
        mesh,
    )
    with jax.set_mesh(mesh), only_finished(args.name, args.out, args.overwrite) as (built, final):
        variables = beginning.put(init()).variables
        every_image = EveryImage(
            Context(config, graphdef, tokenizer, mesh),
            lambda learner, images, _: (encode(learner, images, args.what, args.dtype),),
            args.batch_size,
        )
        side = config.data.image_size
        shape = jax.eval_shape(
            lambda v, images: encode(nnx.merge(graphdef, *v), images, args.what, args.dtype),
            variables,
            jax.ShapeDtypeStruct((1, side, side, 3), np.uint8),
        ).shape[1:]
        first = next(iter(sources.values()))
        dataset = FeatureDataset(
            built, like=first[0], shape=shape, dtype=args.dtype, class_names=first.class_names
        )
        made = _made(args, config, beginning.source, variables) | {"shape": shape, "splits": {}}
        for name, source in sources.items():
            seen, start = np.zeros(len(source), bool), time.perf_counter()
            batches = every_image.batches(variables, source)
            split = dataset.write_split(name, _examples(source, batches, seen, name))
            left_out = [source[int(index)]["id"] for index in np.flatnonzero(~seen)]
            if not split.shards:
                raise UserError(f"--data: {source} has no image that can be decoded.")
            made["splits"][name] = {"examples": int(seen.sum()), "left_out": left_out}
            speed = len(source) / (time.perf_counter() - start)
            yield (
                f"{name}: {seen.sum():,} of {len(source):,} images, {list(shape)} {args.dtype} "
                f"each, {split.bytes / 1e6:,.1f} MB, {speed:,.0f} images/s"
            )
        dataset.finish(f"Features ({args.what}) of {args.data} by {beginning.source}.", made)
    yield f"written to {final}; learn from it with --config.model.name=stored"


def _examples(
    source: Source, batches: Iterator[tuple[np.ndarray, tuple]], seen: np.ndarray, name: str
) -> Iterator[Example]:
    """Yields the examples with their features, and notes in `seen` [N] which there were."""
    # disable=None: no bar where there is no terminal
    with tqdm(desc=name, total=len(source), unit="img", disable=None) as bar:
        for indices, (features,) in batches:
            seen[indices] = True
            for index, array in zip(indices.tolist(), features, strict=True):
                yield source[index] | {"image": array}
            bar.update(len(indices))


def _config(args: argparse.Namespace) -> ConfigDict:
    config = configs.default()
    # What is behind the encoder is the learner's.
    config.learner = learners.defaults("pretrained" if args.what == "head" else "encoder")
    config.encoder, config.batch_size = args.encoder, args.batch_size
    config.data.name, config.data.dir = args.data, args.data_dir
    for field in args.fields:
        name, _, feature = field.partition("=")
        if name not in config.data.fields or not feature:
            raise UserError(f"--fields: {field!r}; write {'|'.join(config.data.fields)}=FEATURE.")
        config.data.fields[name] = feature
    # Of images to be cropped at random in training, evaluation takes the central square.
    config.data.crop = "random" if args.crop == "center" else "none"
    return config


def _tokenizer(config: ConfigDict, what: str) -> Tokenizer:
    """The tokenizer of the learner, which may have none; raises UserError if it has no head."""
    learner = learners.learner_class(config.learner.name)
    if what == "head" and not issubclass(learner, Featurizes):
        raise UserError(
            f"--what: head, but a learner {config.learner.name!r} has no vector of its own behind "
            "its encoder; choose pooled or tokens."
        )
    if "text" not in learner.reads:
        return NoText()
    return inputs.open_tokenizer(config, config.text.tokenizer)


def _made(args: argparse.Namespace, config: ConfigDict, encoder: str, variables: Any) -> dict:
    """Which encoder it was, and what it saw."""
    weights = dict(zip(("params", "stats"), variables, strict=True))
    prints = jax.device_get(jax.jit(fingerprint.fingerprints)(weights))
    told = json.dumps({path: int(value) for path, value in sorted(prints.items())})
    return {
        "version": cap_pretrain.__version__,
        "encoder": encoder,
        "weights": hashlib.sha256(told.encode()).hexdigest(),
        "model": config.model.to_dict(),
        "what": args.what,
        "dtype": args.dtype,
        "data": args.data,
        "image_size": config.data.image_size,
        "crop": args.crop,
    }


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 the user's mistake, 130 interrupted."""
    args = _parse(argv)
    try:
        for line in extract(args):
            print(line, flush=True)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", required=True, help="a workdir, or an exported encoder")
    parser.add_argument("--data", required=True, help="a dataset or its path")
    parser.add_argument("--data_dir", default="", help="where datasets are looked for by name")
    parser.add_argument(
        "--fields", nargs="*", default=[], metavar="FIELD=FEATURE", help="as --config.data.fields"
    )
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="default: train val")
    parser.add_argument("--crop", choices=("none", "center"), default="none", help="default: none")
    parser.add_argument("--what", choices=WHAT, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="default: float32")
    parser.add_argument("--batch_size", type=int, default=256, help="default: 256")
    parser.add_argument("--out", required=True, type=Path, help="written to OUT/NAME/1.0.0")
    parser.add_argument("--name", required=True, help="the dataset's name, like my_features")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished dataset")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
