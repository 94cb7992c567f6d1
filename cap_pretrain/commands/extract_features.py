r"""Store an encoder's features of the images of a dataset, as a dataset to train on.

    cap features --encoder runs/cappa --data data/my_data --splits train val \
        --out data --name my_features --what tokens
    cap train coco_captioning:data=data/my_features --workdir=runs/captions \
        --config.model.name=stored

Training on it equals training with a frozen encoder and no augmentation, without encoding in every
epoch. Captions, labels, ids and questions are copied in order; images that cannot be decoded are
skipped and listed. --encoder is like --config.encoder. OUT/NAME/1.0.0/made.json describes it.
--what head stores the output of layers after the encoder: for a workdir of clip or siglip, the
projected embedding; for jigsaw, the last layer before the output of the network of nine tiles.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
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
from cap_pretrain.cli import arguments
from cap_pretrain.data.regions import regions_of
from cap_pretrain.data.requirements import has_regions
from cap_pretrain.data.sources.base import Example, Source
from cap_pretrain.data.text.tokenizers import NoText, Tokenizer
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context
from cap_pretrain.evals.inference.portions import EveryImage
from cap_pretrain.learners.protocols import Featurizes
from cap_pretrain.models.build import image_shape
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.naflex import SQUARE
from cap_pretrain.training.step import init_state

WHAT = ("pooled", "tokens", "head")
DTYPES = ("float32", "float16")


def encode(learner: Any, images: jax.Array, what: str, dtype: Any) -> jax.Array:
    """Encode images, uint8 [B, H, W, 3], as `dtype` [B, 1 + N, D]: a vector and N tokens.

    N is 0 unless `what` is "tokens". For "head" the learner needs `features`.
    """
    if what == "head":
        rows = [learner.features(images)[:, None]]
    else:
        tokens, pooled = learner.encoder(normalize_images(images, jnp.float32))
        rows = [pooled[:, None], tokens] if what == "tokens" else [pooled[:, None]]
    return jnp.concatenate([row.astype(jnp.float32) for row in rows], axis=1).astype(dtype)


def extract(args: argparse.Namespace) -> Iterator[str]:
    """Write the dataset or nothing, yielding a report; raises UserError if no image is readable."""
    from cap_pretrain.data.builders.build import only_finished
    from cap_pretrain.data.builders.features import FeatureDataset

    config, initial = warm_start.resolve(_config(args))
    assert initial, "--encoder is required"
    if args.crop == "center" and config.data.layout != SQUARE:
        raise UserError(
            f"--crop: the encoder keeps whole images (data.layout={config.data.layout}); use none."
        )
    if args.what == "tokens" and config.data.layout != SQUARE:
        raise UserError(
            "--what: tokens of images in their own aspect ratio are of different numbers, which "
            f"stored features cannot be; use pooled, or an encoder with data.layout={SQUARE}."
        )
    tokenizer = _tokenizer(config, args.what)
    splits = {split.partition("[")[0]: split for split in args.splits}
    if len(splits) < len(args.splits):
        raise UserError(f"--splits: {' '.join(args.splits)} names one split twice; give it once.")
    config.data.held_out = 0  # a dataset without a validation split is extracted whole
    sources = {name: inputs.open_data(config, split) for name, split in splits.items()}
    mesh = sharding.make_mesh(config)
    init, _, graphdef, _ = init_state(
        lambda key: learners.build(config, tokenizer.vocab_size, key),
        lambda _: optax.set_to_zero(),
        config,
        mesh,
    )
    with jax.set_mesh(mesh), only_finished(args.name, args.out, args.overwrite) as (built, final):
        variables = initial.put(init()).variables
        every_image = EveryImage(
            Context(config, graphdef, tokenizer, mesh),
            lambda learner, images, _: (encode(learner, images, args.what, args.dtype),),
            args.batch_size,
        )
        shape = jax.eval_shape(
            lambda v, images: encode(nnx.merge(graphdef, *v), images, args.what, args.dtype),
            variables,
            image_shape(config, 1),
        ).shape[1:]
        first = next(iter(sources.values()))
        # A central square would move what boxes refer to.
        located = has_regions(first)
        if located and config.data.crop != "none":
            located = False
            yield (
                f"data.crop: images are cut to squares, which moves what boxes refer to; the "
                f"regions of {first} are left out"
            )
        like = _with_regions(first, 0) if located else first[0]
        dataset = FeatureDataset(
            built, like=like, shape=shape, dtype=args.dtype, class_names=first.class_names
        )
        made = _made(args, config, initial.source, variables) | {"shape": shape, "splits": {}}
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
        dataset.finish(f"Features ({args.what}) of {args.data} by {initial.source}.", made)
    yield f"written to {final}; train on it with --config.model.name=stored"


def _examples(
    source: Source, batches: Iterator[tuple[np.ndarray, tuple]], seen: np.ndarray, name: str
) -> Iterator[Example]:
    """Yield the examples with their features and mark them in `seen`, bool [len(source)]."""
    with tqdm(desc=name, total=len(source), unit="img", disable=None) as bar:  # None: terminals
        for indices, (features,) in batches:
            seen[indices] = True
            for index, array in zip(indices.tolist(), features, strict=True):
                yield _with_regions(source, index) | {"image": array}
            bar.update(len(indices))


def _with_regions(source: Source, index: int) -> Example:
    """Return an example with its regions, also those that its source computes when asked."""
    example = source[index]
    return example | {"regions": regions_of(source, index, example)}


def _config(args: argparse.Namespace) -> ConfigDict:
    config = configs.default()
    # "head" needs the learner's layers after the encoder.
    config.learner = learners.defaults("pretrained" if args.what == "head" else "encoder")
    config.encoder, config.batch_size = args.encoder, args.batch_size
    config.data.name, config.data.dir = args.data, args.data_dir
    for field in args.fields:
        name, _, feature = field.partition("=")
        if name not in config.data.fields or not feature:
            raise UserError(f"--fields: {field!r}; write {'|'.join(config.data.fields)}=FEATURE.")
        config.data.fields[name] = feature
    # Evaluation takes the central square of images that training would crop at random.
    config.data.crop = "random" if args.crop == "center" else "none"
    return config


def _tokenizer(config: ConfigDict, what: str) -> Tokenizer:
    """Return the learner's tokenizer, which may be NoText; raise UserError if it has no head."""
    if what == "head" and not learners.able(config, Featurizes):
        raise UserError(
            f"--what: head, but a learner {config.learner.name!r} has no layers after its encoder; "
            "choose pooled or tokens."
        )
    if "text" not in learners.reads(config):
        return NoText()
    return inputs.open_tokenizer(config, config.text.tokenizer)


def _made(args: argparse.Namespace, config: ConfigDict, encoder: str, variables: Any) -> dict:
    weights = dict(zip(("params", "stats"), variables, strict=True))
    prints = jax.device_get(jax.jit(fingerprint.fingerprints)(weights))
    text = json.dumps({path: int(value) for path, value in sorted(prints.items())})
    return {
        "version": cap_pretrain.__version__,
        "encoder": encoder,
        "weights": hashlib.sha256(text.encode()).hexdigest(),
        "model": config.model.to_dict(),
        "what": args.what,
        "dtype": args.dtype,
        "data": args.data,
        "image_size": config.data.image_size,
        "crop": args.crop,
        "layout": config.data.layout,
    }


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its status: 0 done, 2 the user's mistake, 130 interrupted."""
    try:
        return arguments.run(_run, _parse(argv))
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    for line in extract(args):
        print(line, flush=True)
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments.documented_parser(__doc__)
    parser.add_argument("--encoder", required=True, help="workdir, or exported encoder")
    parser.add_argument("--data", required=True, help="dataset or its path")
    parser.add_argument("--data_dir", default="", help="folder of datasets given by name")
    parser.add_argument(
        "--fields", nargs="*", default=[], metavar="FIELD=FEATURE", help="see --config.data.fields"
    )
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="default: train val")
    parser.add_argument("--crop", choices=("none", "center"), default="none", help="default: none")
    parser.add_argument("--what", choices=WHAT, required=True)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="default: float32")
    parser.add_argument("--batch_size", type=int, default=256, help="default: 256")
    parser.add_argument(
        "--out", required=True, type=arguments.local_path, help="written to OUT/NAME/1.0.0"
    )
    parser.add_argument("--name", required=True, help="name of the dataset, like my_features")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished dataset")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
