"""Draws what a run has learned as points: images, captions or words, alike ones side by side.

    python tools/plot_embeddings.py --checkpoint runs/cap --out images.png --thumbnails --count 300
    python tools/plot_embeddings.py --checkpoint runs/clip --what captions --out captions.svg
    python tools/plot_embeddings.py --checkpoint runs/cap --what words --method pca --out words.svg

  images    the encoder's pooled features
  captions  of an image each, the first: a dual encoder's text embeddings, else the mean of the
            embeddings of a caption's tokens
  words     the most frequent ones of the captions: the mean of the embeddings of a word's tokens

Points have the colours of the images' labels, if there are any. Two dimensions are made of many by
t-SNE (van der Maaten and Hinton 2008) or PCA; nothing is left to chance, so the same picture comes
out each time. The newest sound checkpoint is used, its averaged parameters if there are any.

Exit status: 0 done, 2 the user's mistake.
"""

import argparse
import collections
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from cap_pretrain import inputs
from cap_pretrain.checkpoints.load import Learner, load_learner
from cap_pretrain.cli import figures
from cap_pretrain.cli.captioning import evaluation_crop
from cap_pretrain.data import pipeline, prefetch
from cap_pretrain.data.sources.base import Source
from cap_pretrain.errors import UserError
from cap_pretrain.evals.inference import word_maps
from cap_pretrain.learners.protocols import EmbedsText
from cap_pretrain.models import readout
from cap_pretrain.models.layers import normalize_images

FEWEST = 5  # points
BATCH = 64
COMPONENTS = 30  # principal ones, that t-SNE is given, as in its authors' experiments (section 4.2)
PERPLEXITY = 30  # of t-SNE, in the range of 5 to 50 that its authors recommend (section 2)
LEGEND = 20  # classes at most that have a legend: so many colours can be told apart
COUNTS = {"images": 1000, "captions": 1000, "words": 150}
METHODS = ("tsne", "pca")
EXAMPLES = 2000  # whose captions say which words are frequent


class Points(NamedTuple):
    """Vectors float32 [n, D] and what is drawn in their places.

    Attributes:
      vectors: of which places are made.
      labels: int [n], into the source's class names; -1 is none.
      images: uint8 [n, S, S, 3] thumbnails, or none, [0, …].
      words: n texts, or none.
    """

    vectors: np.ndarray
    labels: np.ndarray
    images: np.ndarray
    words: Sequence[str] = ()


def of_images(learner: Learner, source: Source, count: int) -> Points:
    """The encoder's pooled features of the first images of a source."""

    def encode(module, batch):
        return readout.read(
            module.encoder, readout.POOLED, normalize_images(batch["image"], jnp.float32)
        )

    return _of_examples(learner, source, count, encode)


def of_captions(learner: Learner, source: Source, count: int) -> Points:
    """Embeddings of the first captions of the first images of a source.

    Raises:
      UserError: the learner reads no text, or the source has no captions.
    """
    tokenizer = learner.tokenizer
    _check_text(learner, source)

    def encode(module, batch):
        text = batch["text"]
        if isinstance(module, EmbedsText):
            return module.embed_text(text)
        real = (text != tokenizer.pad_id) & (text != tokenizer.eos_id)
        vectors = module.decoder.embedding(text).astype(jnp.float32)
        total = jnp.sum(vectors * real[..., None], axis=1)
        return total / jnp.maximum(jnp.sum(real, axis=1, keepdims=True), 1)

    return _of_examples(learner, source, count, encode)


def of_words(learner: Learner, source: Source, count: int) -> Points:
    """Embeddings of the most frequent words of a source's captions, most frequent first.

    Raises:
      UserError: as `of_captions`.
    """
    tokenizer = learner.tokenizer
    _check_text(learner, source)
    counts: collections.Counter[str] = collections.Counter()
    tokens = {}  # of each word, where it came first
    for index in range(min(EXAMPLES, len(source))):
        for caption in source[index]["captions"]:
            ids = tokenizer.encode(caption)
            for word in word_maps.words_of(tokenizer, ids)[1]:
                counts[word.text] += 1
                tokens.setdefault(word.text, ids[list(word.tokens)])
    module = nnx.merge(learner.graphdef, *learner.variables)
    part = module.text_tower if isinstance(module, EmbedsText) else module.decoder
    embedding = np.asarray(part.embedding.embedding[...], np.float32)
    words = [word for word, _ in counts.most_common(count)]
    vectors = np.array([embedding[tokens[word]].mean(0) for word in words])
    return Points(vectors, np.full(len(words), -1), np.zeros((0, 1, 1, 3), np.uint8), words)


def _of_examples(
    learner: Learner, source: Source, count: int, encode: Callable[[nnx.Module, Any], jax.Array]
) -> Points:
    """What `encode(learner, batch)` says of the first examples of a source."""
    config, tokenizer, graphdef, variables = learner

    @jax.jit
    def compute(variables, batch):
        return encode(nnx.merge(graphdef, *variables), batch)

    dataset = pipeline.eval_batches(
        source,
        tokenizer,
        image_size=config.data.image_size,
        batch_size=BATCH,
        crop=evaluation_crop(config.data),
        limit=count,
    )
    parts = []
    for batch in prefetch.iterate(dataset):
        vectors = compute(variables, {"image": batch["image"], "text": batch["text"]})
        real = batch["mask"]
        parts.append([np.asarray(a)[real] for a in (vectors, batch["label"], batch["image"])])
    return Points(*map(np.concatenate, zip(*parts, strict=True)))


def _check_text(learner: Learner, source: Source) -> None:
    if not learner.tokenizer.vocab_size:
        raise UserError(
            f"--what: a {learner.config.learner.name} reads no text; take --what images."
        )
    if not source[0]["captions"]:
        raise UserError(f"--what: {source} has no captions; take --what images.")


SOURCES = {"images": of_images, "captions": of_captions, "words": of_words}


def places(vectors: np.ndarray, method: str) -> np.ndarray:
    """Vectors [n, D] -> [n, 2], by "tsne" or "pca".

    Raises:
      UserError: too few vectors to say anything of, or some are not finite.
    """
    if len(vectors) < FEWEST:
        raise UserError(f"--count: {len(vectors)} points are too few; take {FEWEST} or more.")
    if not np.isfinite(vectors).all():
        raise UserError("--checkpoint: what it says is not finite; take an earlier --step.")
    if method == "pca":
        return principal_components(vectors, 2)
    reduced = principal_components(vectors, COMPONENTS)
    tsne = figures.imported("sklearn.manifold").TSNE(
        perplexity=min(PERPLEXITY, (len(vectors) - 1) / 3), init="pca", random_state=0
    )
    return tsne.fit_transform(reduced)


def principal_components(vectors: np.ndarray, count: int) -> np.ndarray:
    """The coordinates [n, at most count] of vectors [n, D] along the axes of greatest variance."""
    centred = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    u, s, axes = np.linalg.svd(centred, full_matrices=False)
    # An axis has two directions: the one in which its largest entry is positive.
    rows = np.arange(len(axes))
    signs = np.sign(axes[rows, np.argmax(np.abs(axes), axis=1)])
    return (u * s * signs)[:, :count]


def draw(points: Points, xy: np.ndarray, class_names: Sequence[str], thumbnails: bool) -> Any:
    """Returns a figure of the points at xy [n, 2]."""
    figure = figures.new_figure(10, 8)
    axis = figure.subplots()
    axis.set_xticks([])
    axis.set_yticks([])
    axis.margins(0.05)
    if points.words:
        axis.scatter(*xy.T, s=6, color="tab:gray")
        for word, where in zip(points.words, xy, strict=True):
            axis.annotate(word, where, (2, 2), textcoords="offset points", fontsize=8)
        return figure
    present = [int(label) for label in np.unique(points.labels)]
    colours = _colours(len(present))
    for label, colour in zip(present, colours, strict=True):
        own = points.labels == label
        name = class_names[label] if label >= 0 else "no label"
        axis.scatter(*xy[own].T, s=16, color=colour, label=name)
        if thumbnails:
            _put_thumbnails(axis, points.images[own], xy[own], colour)
    if present != [-1] and len(present) <= LEGEND:
        figure.legend(loc="outside right upper", fontsize=8, markerscale=1.5)
    return figure


def _colours(count: int) -> list[Any]:
    maps = figures.imported("matplotlib").colormaps
    if count <= 10:
        return list(maps["tab10"].colors[:count])
    if count <= LEGEND:
        return list(maps["tab20"].colors[:count])
    return list(maps["hsv"](np.arange(count) / count))


def _put_thumbnails(axis: Any, images: np.ndarray, xy: np.ndarray, colour: Any) -> None:
    """Puts images over their points, framed in their colour."""
    boxes = figures.imported("matplotlib.offsetbox")
    for image, where in zip(images, xy, strict=True):
        picture = boxes.OffsetImage(image, zoom=24 / len(image))
        frame = dict(edgecolor=colour, linewidth=1)
        axis.add_artist(boxes.AnnotationBbox(picture, where, pad=0.05, bboxprops=frame))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, as said above."""
    args = _parse(argv)
    logging.set_verbosity(logging.ERROR)
    try:
        figures.check_name(args.out)
        if args.thumbnails and args.what == "words":
            raise UserError("--thumbnails: words have none; leave it out.")
        learner = load_learner(args.checkpoint, step=args.step)
        split = args.split or learner.config.data.eval_split
        source = inputs.open_data(learner.config, split, args.data)
        points = SOURCES[args.what](learner, source, args.count or COUNTS[args.what])
        xy = places(points.vectors, args.method)
        figures.save(draw(points, xy, source.class_names, args.thumbnails), args.out)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out}: {len(xy)} {args.what}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="the workdir of a run")
    parser.add_argument("--step", type=int, help="which of its checkpoints; default: the newest")
    parser.add_argument("--out", required=True, type=Path, help="a file *.png or *.svg")
    parser.add_argument("--what", choices=SOURCES, default="images", help="default: images")
    parser.add_argument("--method", choices=METHODS, default="tsne", help="default: tsne")
    parser.add_argument("--thumbnails", action="store_true", help="draw the images, not points")
    told = ", ".join(f"{count} {what}" for what, count in COUNTS.items())
    parser.add_argument("--count", type=_positive, help=f"of points; default: {told}")
    parser.add_argument("--data", default="", help="a dataset or its path; default: the run's own")
    parser.add_argument("--split", default="", help="default: the run's split for evaluation")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
