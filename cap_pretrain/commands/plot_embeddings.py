"""Plot a run's embeddings of images, captions or words in two dimensions.

    cap embeddings --checkpoint runs/cap --out images.png --thumbnails --count 300
    cap embeddings --checkpoint runs/cap --what words --method pca --out words.svg

images are the encoder's pooled features; captions are the first ones, by a dual encoder's text
embedding, else the mean of token embeddings; words are the most frequent ones of the captions, by
the mean of token embeddings. Colors are the images' labels, if any; of more than 20 classes, the
most frequent ones that have room are named at their centers. Dimensions are reduced by t-SNE
(van der Maaten and Hinton 2008) or PCA, deterministically. The newest valid checkpoint is used,
with averaged parameters if it has them. Exit status: 0 done, 2 the user's mistake.
"""

import argparse
import collections
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from tqdm import tqdm

from cap_pretrain import inputs, naflex
from cap_pretrain.checkpoints.load import Learner
from cap_pretrain.checkpoints.open import open_learner
from cap_pretrain.cli import arguments, figures
from cap_pretrain.data import pipeline, prefetch, views
from cap_pretrain.data.sources.base import Source
from cap_pretrain.errors import UserError
from cap_pretrain.evals.inference import word_maps
from cap_pretrain.learners.protocols import EmbedsText
from cap_pretrain.models import native, readout
from cap_pretrain.models.layers import normalize_images

MIN_POINTS = 5
BATCH = 64
COMPONENTS = 30  # principal components given to t-SNE, as in its authors' experiments (section 4.2)
PERPLEXITY = 30  # of t-SNE; its authors recommend 5 to 50 (section 2)
LEGEND = 20  # maximum classes in a legend: more colors cannot be told apart
LABELS = 60  # maximum classes that are named at their centers
COUNTS = {"images": 1000, "captions": 1000, "words": 150}
THUMBNAIL = 64  # side in pixels of images that are no squares
METHODS = ("tsne", "pca")
EXAMPLES = 2000  # number of examples whose captions give the word frequencies


class Points(NamedTuple):
    """Embeddings and what to draw for each of them."""

    vectors: np.ndarray  # float32 [n, D]
    labels: np.ndarray  # indices into the source's class names, int [n]; -1 is no label
    images: np.ndarray  # thumbnails, uint8 [n, S, S, 3], or [0, …] without them
    words: Sequence[str] = ()  # n words, or none


def of_images(learner: Learner, source: Source, count: int) -> Points:
    """Return the encoder's pooled features of the first `count` images of a source."""

    def encode(module, batch):
        return readout.read(
            module.encoder, readout.POOLED, normalize_images(batch["image"], jnp.float32)
        )

    return _of_examples(learner, source, count, encode)


def of_captions(learner: Learner, source: Source, count: int) -> Points:
    """Return embeddings of first captions; raises UserError if there is no text."""
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
    """Return the most frequent words, in order; raises UserError if there is no text."""
    tokenizer = learner.tokenizer
    _check_text(learner, source)
    counts: collections.Counter[str] = collections.Counter()
    tokens: dict[str, np.ndarray] = {}  # token ids of each word's first occurrence
    for index in tqdm(range(min(EXAMPLES, len(source))), unit="img", disable=None):
        for caption in source[index]["captions"]:
            ids = tokenizer.encode(caption)
            for word in word_maps.words_of(tokenizer, ids)[1]:
                counts[word.text] += 1
                tokens.setdefault(word.text, ids[list(word.tokens)])
    module = nnx.merge(learner.graphdef, *learner.variables)
    part = getattr(module, "text_tower" if isinstance(module, EmbedsText) else "decoder")
    embedding = np.asarray(part.embedding.embedding[...], np.float32)
    words = [word for word, _ in counts.most_common(count)]
    vectors = np.array([embedding[tokens[word]].mean(0) for word in words])
    return Points(vectors, np.full(len(words), -1), np.zeros((0, 1, 1, 3), np.uint8), words)


def _of_examples(
    learner: Learner, source: Source, count: int, encode: Callable[[nnx.Module, Any], jax.Array]
) -> Points:
    """Return the vectors that `encode(learner, batch)` gives for the first examples of a source."""
    config, tokenizer, graphdef, variables = learner

    @jax.jit
    def compute(variables, batch):
        return encode(nnx.merge(graphdef, *variables), batch)

    dataset = pipeline.eval_batches(
        source,
        tokenizer,
        view=inputs.view(config),
        batch_size=BATCH,
        limit=count,
    )
    parts = []
    for batch in tqdm(prefetch.iterate(dataset), total=len(dataset), unit="batch", disable=None):
        vectors = compute(variables, {"image": batch["image"], "text": batch["text"]})
        real = batch["mask"]
        found = vectors, batch["label"], _shown(batch["image"])
        parts.append([np.asarray(array)[real] for array in found])
    vectors, labels, thumbnails = map(np.concatenate, zip(*parts, strict=True))
    return Points(vectors, labels, thumbnails)


def _shown(images: np.ndarray) -> np.ndarray:
    """Return images uint8 [B, H, W, 3] of a batch; those in their own aspect ratio as squares."""
    if not native.is_packed(images):
        return images
    return np.stack([views.picture(naflex.unpacked(image), THUMBNAIL) for image in images])


def _check_text(learner: Learner, source: Source) -> None:
    if not learner.tokenizer.vocab_size:
        raise UserError(
            f"--what: a {learner.config.learner.name} reads no text; use --what images."
        )
    if not source[0]["captions"]:
        raise UserError(f"--what: {source} has no captions; use --what images.")


SOURCES = {"images": of_images, "captions": of_captions, "words": of_words}


def places(vectors: np.ndarray, method: str) -> np.ndarray:
    """Reduce vectors [n, D] to coordinates [n, 2]; raises UserError if too few or not finite."""
    if len(vectors) < MIN_POINTS:
        raise UserError(f"--count: {len(vectors)} points are too few; use {MIN_POINTS} or more.")
    if not np.isfinite(vectors).all():
        raise UserError("--checkpoint: its embeddings are not finite; use an earlier --step.")
    if method == "pca":
        return principal_components(vectors, 2)
    reduced = principal_components(vectors, COMPONENTS)
    tsne = figures.imported("sklearn.manifold").TSNE(
        perplexity=min(PERPLEXITY, (len(vectors) - 1) / 3), init="pca", random_state=0
    )
    return tsne.fit_transform(reduced)


def principal_components(vectors: np.ndarray, count: int) -> np.ndarray:
    """Project vectors [n, D] onto their first principal components: [n, min(count, n, D)]."""
    centered = vectors.astype(np.float64) - vectors.mean(0, dtype=np.float64)
    u, s, axes = np.linalg.svd(centered, full_matrices=False)
    rows = np.arange(len(axes))  # the largest entry of each axis becomes positive
    signs = np.sign(axes[rows, np.argmax(np.abs(axes), axis=1)])
    return (u * s * signs)[:, :count]


def draw(points: Points, xy: np.ndarray, class_names: Sequence[str], thumbnails: bool) -> Any:
    """Return a figure of the points at `xy`, float [n, 2]."""
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
    handles: list[Any] = []
    names: list[str] = []
    present = [int(label) for label in np.unique(points.labels)]
    for label, color in zip(present, _colors(len(present)), strict=True):
        own = points.labels == label
        handles.append(axis.scatter(*xy[own].T, s=16, color=color))
        names.append(class_names[label] if label >= 0 else "no label")
        if thumbnails:
            _put_thumbnails(axis, points.images[own], xy[own], color)
    if present != [-1] and len(present) <= LEGEND:
        # Named explicitly, because matplotlib hides labels that begin with "_".
        figure.legend(handles, names, loc="outside right upper", fontsize=8, markerscale=1.5)
    elif present != [-1]:
        _name_clusters(figure, points.labels, xy, class_names)
    return figure


def _name_clusters(
    figure: Any, labels: np.ndarray, xy: np.ndarray, class_names: Sequence[str]
) -> None:
    """Write names of classes at the medians of their points, the most frequent first.

    Names that would cover an earlier one are left out, and a note says how many are there.
    """
    axis = figure.axes[0]
    outline = figures.imported("matplotlib.patheffects").withStroke(linewidth=2.5, foreground="w")
    found, counts = np.unique(labels[labels >= 0], return_counts=True)
    note = axis.text(0.005, 0.005, "0", transform=axis.transAxes, fontsize=8, color="#444444")
    figures.fit_layout(figure)
    taken = [note.get_window_extent()]
    for label in found[np.argsort(-counts, kind="stable")][:LABELS]:
        center = np.median(xy[labels == label], axis=0)
        text = axis.text(*center, class_names[label], ha="center", va="center", fontsize=9)
        text.set_path_effects([outline])
        place = text.get_window_extent().padded(2)
        if any(place.overlaps(other) for other in taken):
            text.remove()
        else:
            taken.append(place)
    note.set_text(f"{len(taken) - 1} of {len(found)} classes are named, the most frequent first")


def _colors(count: int) -> list[Any]:
    maps = figures.imported("matplotlib").colormaps
    if count <= 10:
        return list(maps["tab10"].colors[:count])
    if count <= LEGEND:
        return list(maps["tab20"].colors[:count])
    # Neighbors in hue differ in brightness.
    shades = np.where(np.arange(count) % 2, 0.6, 1.0)[:, None]
    return list(maps["hsv"](np.arange(count) / count)[:, :3] * shades)


def _put_thumbnails(axis: Any, images: np.ndarray, xy: np.ndarray, color: Any) -> None:
    """Draw images over their points, framed in their color."""
    boxes = figures.imported("matplotlib.offsetbox")
    for image, where in zip(images, xy, strict=True):
        picture = boxes.OffsetImage(image, zoom=24 / len(image))
        frame = dict(edgecolor=color, linewidth=1)
        axis.add_artist(boxes.AnnotationBbox(picture, where, pad=0.05, bboxprops=frame))


def _run(args: argparse.Namespace) -> int:
    figures.check_name(args.out)
    if args.thumbnails and args.what == "words":
        raise UserError("--thumbnails: words have no images; remove the option.")
    with arguments.waiting(f"Loading {args.checkpoint}"):
        learner = open_learner(args.checkpoint, args.step)
    split = args.split or learner.config.data.eval_split
    source = inputs.open_data(learner.config, split, args.data)
    points = SOURCES[args.what](learner, source, args.count or COUNTS[args.what])
    with arguments.waiting(f"Placing {len(points.vectors):,} points"):
        xy = places(points.vectors, args.method)
    figures.save(draw(points, xy, source.class_names, args.thumbnails), args.out)
    print(f"wrote {args.out}: {len(xy)} {args.what}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the tool and return its exit status (see above)."""
    parser = arguments.documented_parser(__doc__)
    arguments.add_checkpoint(parser)
    arguments.add_figure(parser)
    arguments.add_dataset(parser)
    parser.add_argument("--what", choices=SOURCES, default="images", help="default: images")
    parser.add_argument("--method", choices=METHODS, default="tsne", help="default: tsne")
    parser.add_argument("--thumbnails", action="store_true", help="draw images, not points")
    defaults = ", ".join(f"{count} {what}" for what, count in COUNTS.items())
    parser.add_argument(
        "--count", type=arguments.positive_int, help=f"number of points; default: {defaults}"
    )
    args = parser.parse_args(argv)
    logging.set_verbosity(logging.ERROR)
    return arguments.run(_run, args)


if __name__ == "__main__":
    sys.exit(main())
