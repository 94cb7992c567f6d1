"""Opening what a run reads according to its config: datasets and tokenizer."""

import contextlib
import functools
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import files, learners
from cap_pretrain.data import blocks, requirements, views
from cap_pretrain.data.sources import base, subset
from cap_pretrain.data.sources.base import NoSplitError, Source, parse_mixture
from cap_pretrain.data.sources.open import GENERATED, open_source
from cap_pretrain.data.sources.ranges import Cache
from cap_pretrain.data.text import byte_pairs, tokenizers, words
from cap_pretrain.distributed import cluster
from cap_pretrain.errors import UserError
from cap_pretrain.models import build
from cap_pretrain.models.sizes import STORED
from cap_pretrain.telemetry import console

# Examples per dataset whose captions train a new sentencepiece tokenizer.
TOKENIZER_EXAMPLES = 50_000
PREFIXES = 1000  # times that a new tokenizer sees each of data.caption_prefixes

# Subsets of a dataset are drawn with this seed, so that runs with other seeds are comparable.
SUBSET_SEED = 0

# The default `data.split`, and `data.eval_split`, a part of the former where there is none.
TRAINING, VALIDATION = "train", "val"

Mixture = list[tuple[Source, float]]
"""Datasets and their relative weights."""


def open_data(config: ConfigDict, split: str, name: str = "", share: float = 0.0) -> Source:
    """Open a dataset as `config.data` says; `name` is by default the first one of `data.name`.

    `share` is that of `data.cache_gb` which this process may use; 0: as much as others.

    In the run's own datasets, all splits have only the classes that `data.class_min` keeps, and
    `data.split` at most `data.class_max` examples of each. Other datasets are not restricted.

    Raises:
        UserError: see `open_source` and `subset.ClassSizes.of`; or the dataset holds features and
            the model needs images, or the other way round.
    """
    members = [member for member, _ in parse_mixture(config.data.name)]
    name = name or members[0]
    source = _open_unrestricted(config.data, split, name, share)
    features, stored = views.is_features(source[0]["image"]), config.model.name == STORED
    if features and not stored:
        raise UserError(
            f"data.name: {source} holds features of another encoder instead of images; set "
            f"--config.model.name={STORED} and no encoder to train on them."
        )
    if stored and not features:
        raise UserError(
            f"model.name: {STORED} is for features, but {source} holds images; extract features "
            "with tools/extract_features.py, or name an encoder."
        )
    sizes = subset.ClassSizes(config.data.class_min, config.data.class_max)
    if not (sizes and name in members):
        return source
    section = json.dumps(config.data.to_dict())
    training = _labels(section, config.data.split, name)
    drawn = SUBSET_SEED if split == config.data.split else None
    return sizes.of(source, _labels(section, split, name), training, drawn=drawn)


def _open_unrestricted(section: ConfigDict, split: str, name: str, share: float = 0.0) -> Source:
    """Open a dataset with all its classes; `section` is `config.data`.

    If the dataset is the first of `data.name` and has only the split train, and `data.split` and
    `data.eval_split` are the defaults, then "val" is a part of it and "train" the rest (see
    `subset.divided`).
    """
    cache = section.cache
    if blocks.order_of(section) == "blocks":
        share = share or 1 / cluster.processes()
        cache = Cache(cache, section.block, share * section.cache_gb * 1e9)
    open_split = functools.partial(
        open_source,
        name,
        image_size=section.image_size,
        data_dir=section.dir,
        cache=cache,
        fields=section.fields.to_dict(),
        generated={dataset: section[dataset].to_dict() for dataset in GENERATED},
    )
    defaults = (section.split, section.eval_split) == (TRAINING, VALIDATION) and section.held_out
    first, _ = parse_mixture(section.name)[0] if section.name else ("", 0)
    if not defaults or name != first or split not in (TRAINING, VALIDATION):
        return open_split(split)
    try:
        source = open_split(split)
    except NoSplitError as error:
        if split != VALIDATION or error.splits != (TRAINING,):
            raise
        return subset.divided(open_split(TRAINING), section.held_out)[1]
    only = getattr(source, "splits", ()) == (TRAINING,)
    return subset.divided(source, section.held_out)[0] if only else source


@functools.lru_cache(maxsize=8)  # each evaluator opens the data separately
def _labels(section: str, split: str, name: str) -> np.ndarray:
    """Return the stored labels of a split, int [N]; `section` is `config.data` as JSON."""
    return subset.labels_of(_open_unrestricted(ConfigDict(json.loads(section)), split, name))


def open_sources(config: ConfigDict, share: float = 0.0) -> Mixture:
    """Open the datasets of the training mixture; `share` is as for `open_data`.

    Raises UserError if one is missing, or lacks captions or labels that the learner needs.
    """
    reads = learners.reads(config)
    members = []
    for name, weight in parse_mixture(config.data.name):
        source = open_data(config, config.data.split, name, share)
        for own in learners.needs(config):  # a part does not see what another can do without
            requirements.check_reads(
                source, own, f"data.name: {{}}, which the learner {config.learner.name} needs"
            )
        members.append((subset.fraction_of(source, config.data.fraction, SUBSET_SEED), weight))
    requirements.check_regions([source for source, _ in members], reads)
    return members


def view(config: ConfigDict) -> views.View:
    """Return how the learner of a config sees images in evaluation."""
    data = config.data
    crop: Literal["none", "center"] = "none" if data.crop == "none" else "center"
    return views.View(data.image_size, crop, build.patch_of(config))


def regions_read(config: ConfigDict) -> int:
    """Return how many regions of an image a batch has: `data.regions` if the learner reads any."""
    return config.data.regions if "boxes" in learners.reads(config) else 0


def held_out(config: ConfigDict, mixture: Mixture) -> list[str]:
    """Return a line for each of the run's datasets of which a part is held out."""
    sources = [source for source, _ in mixture]
    if not mixture and config.evals:
        with contextlib.suppress(UserError):  # perhaps no evaluator reads it
            sources = [open_data(config, config.data.eval_split)]
    return [note for source in sources if (note := getattr(source, "note", ""))]


def completed(config: ConfigDict, mixture: Mixture) -> ConfigDict:
    """Return the config with the fields that depend on the data filled in.

    These are `data.held_out`, `data.order`, `data.lanes`, `learner.classes` if it is 0, the fields
    returned by the learner's `settled` method if it has one and, with stored features,
    `model.tokens` and `model.width`; rules on the parameters of the encoder, which does not exist
    then, are removed. An empty mixture changes nothing.
    Datasets with features of different shapes raise UserError.
    """
    if not mixture:
        return config
    config = config.copy_and_resolve_references()
    if count := getattr(mixture[0][0], "held_out", 0):
        config.data.held_out = count
    blocks.settle(config.data, config.batch_size)
    if config.learner.get("classes", None) == 0:
        config.learner.classes = len(mixture[0][0].class_names)
    if settled := getattr(learners.learner_class(config.learner.name), "settled", None):
        config.learner.update(settled(config, mixture))
    if config.model.name == STORED:
        shapes = [source[0]["image"].shape for source, _ in mixture]
        if len(set(shapes)) > 1:
            raise UserError(
                f"data.name: {config.data.name} holds features of different "
                f"shapes, {shapes}; name datasets with the same features."
            )
        config.model.tokens, config.model.width = shapes[0][0] - 1, shapes[0][1]
        for field in ("lr_rules", "decay_rules"):
            kept = tuple(r for r in config.optim[field] if not r[0].startswith("encoder/"))
            config.optim[field] = kept
    return config


def open_tokenizer(config: ConfigDict, path: str | Path) -> tokenizers.Tokenizer:
    """Open a tokenizer file: of words, of CLIP's byte pairs, or a sentencepiece model.

    The last is used with `text.lower` and `text.punctuation`.
    """
    text = config.text
    if words.is_words_file(path):
        return words.WordTokenizer(path, text.length)
    if byte_pairs.is_byte_pairs_file(path):
        return byte_pairs.BytePairTokenizer(path, text.length)
    return tokenizers.SentencePieceTokenizer(path, text.length, text.lower, text.punctuation)


# The tokenizer in a workdir: a sentencepiece model, a words file or CLIP's byte pairs.
TOKENIZER_FILE = "tokenizer/tokenizer.model"
WORDS_FILE = f"tokenizer/{words.WORDS_FILE}"
BYTE_PAIRS_FILE = "tokenizer/byte_pairs.json"


def tokenizer_path(workdir: Path) -> Path:
    """Return the path of a run's tokenizer, of any kind; the file may not exist."""
    others = (workdir / WORDS_FILE, workdir / BYTE_PAIRS_FILE)
    return next((path for path in others if path.exists()), workdir / TOKENIZER_FILE)


def prepare_tokenizer(
    config: ConfigDict, mixture: Mixture, workdir: Path, *, anew: bool
) -> tokenizers.Tokenizer:
    """Return the run's tokenizer, creating it in `workdir/tokenizer/` if necessary.

    It is copied from `text.tokenizer`, or built from the captions of `mixture`. With `anew`, an
    existing file is replaced, because no checkpoint was made with it. For a learner that reads no
    text the result is `NoText`, without a file. Raises UserError if `text.tokenizer` does not fit
    the config.
    """
    if "text" not in learners.reads(config):
        return tokenizers.NoText()

    def make(_: list[None]) -> None:
        if anew or not tokenizer_path(workdir).exists():
            _make_tokenizer(config, mixture, workdir)

    cluster.decided(None, make)  # on host 0 only
    return open_tokenizer(config, tokenizer_path(workdir))


def _stored(given: Path) -> tuple[str, bytes]:
    """Return the name that a tokenizer file has in a workdir, and its content there."""
    if byte_pairs.is_byte_pairs_file(given):  # perhaps two files
        return BYTE_PAIRS_FILE, byte_pairs.content(byte_pairs.read(given))
    name = WORDS_FILE if words.is_words_file(given) else TOKENIZER_FILE
    return name, given.read_bytes()


def _make_tokenizer(config: ConfigDict, mixture: Mixture, workdir: Path) -> None:
    """Write the tokenizer file of a run, replacing those of any kind."""
    given = config.text.tokenizer
    if given:
        open_tokenizer(config, given)  # raises if the file does not fit
        name, data = _stored(files.place(given))  # read first: it may be in this workdir
    for left_over in (TOKENIZER_FILE, WORDS_FILE, BYTE_PAIRS_FILE):
        (workdir / left_over).unlink(missing_ok=True)
    if given:
        files.write_bytes(workdir / name, data)
        return
    folder, lower = (workdir / TOKENIZER_FILE).parent, config.text.lower
    prefixes = [prefix for prefix in config.data.caption_prefixes if prefix]
    more = prefixes * max(PREFIXES, config.text.words.min_count)
    if config.text.kind == "words":  # the minimum count refers to all captions
        # All captions of a stored dataset, but no million scenes, which have few words.
        drawn = all(name in GENERATED for name, _ in parse_mixture(config.data.name))
        limit = TOKENIZER_EXAMPLES if drawn else None
        with console.doing(f"Counting the words of the captions of {images_of(mixture, limit)}"):
            captions = itertools.chain(_captions(config, mixture, limit), more)
            words.write_words(captions, folder, words.Rules(**config.text.words), lower)
    else:
        images = images_of(mixture, TOKENIZER_EXAMPLES)
        with console.doing(f"Training a tokenizer on the captions of {images}"):
            captions = itertools.chain(_captions(config, mixture, TOKENIZER_EXAMPLES), more)
            tokenizers.train_sentencepiece(
                captions, folder, config.text.vocab_size, lower, punctuation=config.text.punctuation
            )


def images_of(mixture: Mixture, limit: int | None = None) -> str:
    """Return how many examples `_captions` reads, as "3,096 images", and bytes if it reads all."""
    images = f"{sum(min(limit or len(source), len(source)) for source, _ in mixture):,} images"
    size = sum(base.example_bytes(source) * len(source) for source, _ in mixture) / 1e9
    return f"{images} (all {size:,.1f} GB are read)" if limit is None and size else images


def _captions(config: ConfigDict, mixture: Mixture, limit: int | None = None) -> Iterator[str]:
    """Yield the captions of all datasets, from at most `limit` examples of each, or its blocks."""
    block = config.data.block if blocks.order_of(config.data) == "blocks" else 0
    for source, _ in mixture:
        yield from tokenizers.source_captions(source, limit, block, bool(regions_read(config)))


def planned_tokenizer(config: ConfigDict, mixture: Mixture) -> tokenizers.Tokenizer | None:
    """Return the tokenizer that `prepare_tokenizer` will create, without a workdir.

    None if sentencepiece will train one of the config's vocabulary size. With `data.buckets` it is
    trained here, because the number of batches depends on caption lengths.
    """
    if not (config.text.tokenizer or config.text.kind == "words" or config.data.buckets):
        return None
    with tempfile.TemporaryDirectory() as folder:
        return prepare_tokenizer(config, mixture, files.place(folder), anew=True)


def tokenizer_identity(workdir: Path) -> dict[str, str]:
    """Return {file: SHA-256} of the run's tokenizer, saved with checkpoints; {} without one."""
    path = tokenizer_path(workdir)
    if not path.exists():
        return {}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {path.relative_to(workdir).as_posix(): digest}
