"""From a config to what a run reads: datasets, tokenizer, batches."""

import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import files, learners
from cap_pretrain.data import pipeline
from cap_pretrain.data.sources import buckets, subset
from cap_pretrain.data.sources.base import Source, parse_mixture
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.data.text import tokenizers, words
from cap_pretrain.distributed import cluster
from cap_pretrain.errors import UserError
from cap_pretrain.models.sizes import STORED

# Examples of each dataset whose captions a new tokenizer is trained on.
TOKENIZER_EXAMPLES = 50_000

# Who belongs to a part of a dataset is the same for every run that is compared.
SUBSET_SEED = 0

Mixture = list[tuple[Source, float]]


def open_data(config: ConfigDict, split: str, name: str = "") -> Source:
    """Opens a dataset as `config.data` says; by default the (first of the) run's own.

    Its own datasets have in all splits the classes that `data.class_min` keeps, and in `data.split`
    no more of each than `data.class_max`. Others, which evaluators name, are left as they are.

    Raises:
      UserError: as `sources.open_source`; it holds features and not images, or the other way round;
        as `subset.ClassSizes.of`.
    """
    members = [member for member, _ in parse_mixture(config.data.name)]
    name = name or members[0]
    source = _open_whole(config.data, split, name)
    features, stored = pipeline.is_features(source[0]["image"]), config.model.name == STORED
    if features and not stored:
        raise UserError(
            f"data.name: {source} holds features of another encoder instead of images; set "
            f"--config.model.name={STORED} to learn from them, and no encoder."
        )
    if stored and not features:
        raise UserError(
            f"model.name: {STORED} is for features, and {source} holds images; store theirs with "
            "tools/extract_features.py, or name an encoder."
        )
    sizes = subset.ClassSizes(config.data.class_min, config.data.class_max)
    if not (sizes and name in members):
        return source
    section = json.dumps(config.data.to_dict())
    training = _labels(section, config.data.split, name)
    drawn = SUBSET_SEED if split == config.data.split else None
    return sizes.of(source, _labels(section, split, name), training, drawn=drawn)


def _open_whole(section: ConfigDict, split: str, name: str) -> Source:
    return open_source(
        name,
        split,
        image_size=section.image_size,
        data_dir=section.dir,
        cache=section.cache,
        fields=section.fields.to_dict(),
        scenes=section.scenes.to_dict(),
    )


# Remembered, as each evaluator opens the data for itself.
@functools.lru_cache(maxsize=8)
def _labels(section: str, split: str, name: str) -> np.ndarray:
    """The labels of a split as it is stored, where `section` is config.data as JSON."""
    return subset.labels_of(_open_whole(ConfigDict(json.loads(section)), split, name))


def open_sources(config: ConfigDict) -> Mixture:
    """Opens the members of the training mixture, with their weights.

    Raises:
      UserError: a dataset is missing, or lacks what the learner reads.
    """
    reads = learners.learner_class(config.learner.name).reads
    members = []
    for name, weight in parse_mixture(config.data.name):
        source = open_data(config, config.data.split, name)
        example = source[0]
        for part, missing in (("text", not example["captions"]), ("label", example["label"] < 0)):
            if part in reads and missing:
                raise UserError(
                    f"data.name: {source} has no {part}, which a {config.learner.name} learns "
                    "from; name another dataset or set data.fields."
                )
        members.append((subset.fraction_of(source, config.data.fraction, SUBSET_SEED), weight))
    return members


def completed(config: ConfigDict, mixture: Mixture) -> ConfigDict:
    """Returns the config with what the data settles.

    That is `learner.classes`, where it is a field and 0, and what a learner that has `settled`
    settles by it. And with stored features their number and width, and that rules on the encoder's
    parameters say nothing, of which there are none.

    Raises:
      UserError: members of the mixture hold features of different shapes.
    """
    if not mixture:
        return config
    config = config.copy_and_resolve_references()
    if config.learner.get("classes", None) == 0:
        config.learner.classes = len(mixture[0][0].class_names)
    if settled := getattr(learners.learner_class(config.learner.name), "settled", None):
        config.learner.update(settled(config, mixture))
    if config.model.name == STORED:
        shapes = [source[0]["image"].shape for source, _ in mixture]
        if len(set(shapes)) > 1:
            raise UserError(f"data.name: {config.data.name} holds features of shapes {shapes}.")
        config.model.tokens, config.model.width = shapes[0][0] - 1, shapes[0][1]
        for field in ("lr_rules", "decay_rules"):
            kept = tuple(r for r in config.optim[field] if not r[0].startswith("encoder/"))
            config.optim[field] = kept
    return config


def open_tokenizer(config: ConfigDict, path: str | Path) -> tokenizers.Tokenizer:
    """Opens a file of words, or a sentencepiece model with the config's casing."""
    if words.is_words_file(path):
        return words.WordTokenizer(path, config.text.length)
    return tokenizers.SentencePieceTokenizer(path, config.text.length, config.text.lower)


# Where a workdir keeps the tokenizer of its run: a sentencepiece model, or words.
TOKENIZER_FILE = "tokenizer/tokenizer.model"
WORDS_FILE = f"tokenizer/{words.WORDS_FILE}"


def tokenizer_path(workdir: Path) -> Path:
    """The file of a run's tokenizer, of either kind; there may be none."""
    path = workdir / WORDS_FILE
    return path if path.exists() else workdir / TOKENIZER_FILE


def prepare_tokenizer(
    config: ConfigDict, mixture: Mixture, workdir: Path, *, anew: bool
) -> tokenizers.Tokenizer:
    """Returns the run's tokenizer, kept in `workdir/tokenizer/`: given, or made once.

    With `anew`, one that is there already counts for nothing: no checkpoint was made with it. For a
    learner that reads no text there is none.
    """
    if "text" not in learners.learner_class(config.learner.name).reads:
        return tokenizers.NoText()

    def make(_: list[None]) -> None:
        if anew or not tokenizer_path(workdir).exists():
            _make_tokenizer(config, mixture, workdir)

    cluster.decided(None, make)  # host 0 does, for all
    return open_tokenizer(config, tokenizer_path(workdir))


def _make_tokenizer(config: ConfigDict, mixture: Mixture, workdir: Path) -> None:
    given = config.text.tokenizer
    if given:
        open_tokenizer(config, given)  # refuses a file that does not fit
        data = Path(given).read_bytes()  # which may be in this workdir
        name = WORDS_FILE if words.is_words_file(given) else TOKENIZER_FILE
    for left_over in (TOKENIZER_FILE, WORDS_FILE):
        (workdir / left_over).unlink(missing_ok=True)
    if given:
        files.write_bytes(workdir / name, data)
        return
    folder, lower = (workdir / TOKENIZER_FILE).parent, config.text.lower
    if config.text.kind == "words":  # whose threshold is on their number in all captions
        captions = _captions(mixture)
        words.write_words(captions, folder, words.Rules(**config.text.words), lower)
    else:
        captions = _captions(mixture, TOKENIZER_EXAMPLES)
        tokenizers.train_sentencepiece(captions, folder, config.text.vocab_size, lower)


def _captions(mixture: Mixture, limit: int | None = None) -> Iterator[str]:
    """Yields the captions of all members, or of `limit` examples of each."""
    for source, _ in mixture:
        yield from tokenizers.source_captions(source, limit)


def planned_tokenizer(config: ConfigDict, mixture: Mixture) -> tokenizers.Tokenizer | None:
    """What `prepare_tokenizer` will give; None for pieces to be trained, as many as asked for.

    For batches of one length these are trained, too, as the number of batches depends on them.
    """
    if not (config.text.tokenizer or config.text.kind == "words" or config.data.buckets):
        return None
    with tempfile.TemporaryDirectory() as folder:
        return prepare_tokenizer(config, mixture, Path(folder), anew=True)


def tokenizer_identity(workdir: Path) -> dict[str, str]:
    """What binds a checkpoint to the run's tokenizer: its file and the SHA-256 of that."""
    path = tokenizer_path(workdir)
    if not path.exists():
        return {}
    name = path.relative_to(workdir).as_posix()
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()}


def in_buckets(
    config: ConfigDict, mixture: Mixture, tokenizer: tokenizers.Tokenizer | None
) -> Mixture:
    """Returns the mixture as it is, or with `data.buckets` its captions, a member for each length.

    Every record is read once.
    """
    if not (config.data.buckets and mixture):
        return mixture
    return [(group, 1.0) for source, _ in mixture for group in buckets.by_length(source, tokenizer)]


def examples_an_epoch(config: ConfigDict, mixture: Mixture) -> int:
    """Examples of an epoch of a mixture that went through `in_buckets`."""
    if config.data.buckets and mixture:
        return _order(config, mixture).batches * config.batch_size
    return sum(len(source) for source, _ in mixture)


def describe(config: ConfigDict, mixture: Mixture) -> list[str]:
    """What people should know of a mixture that went through `in_buckets`, in lines."""
    members = [source for source, _ in mixture]
    if config.data.buckets and members:
        return [buckets.describe(members, config.batch_size)]
    parts = [source for source in members if isinstance(source, subset.Subset)]
    return [f"Part of a dataset: {source}: {len(source):,} examples." for source in parts]


def _order(config: ConfigDict, mixture: Mixture) -> buckets.Order | None:
    if not config.data.buckets:
        return None
    return buckets.Order([source for source, _ in mixture], config.batch_size, config.seed)


def training_batches(
    config: ConfigDict,
    mixture: Mixture,
    tokenizer: tokenizers.Tokenizer,
    rows: Sequence[int] | None = None,
) -> grain.MapDataset:
    """The dataset whose element t is batch t, or some `rows` of it.

    The mixture went through `in_buckets`.
    """
    return pipeline.train_dataset(
        mixture,
        tokenizer,
        image_size=config.data.image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        crop=config.data.crop,
        flip=config.data.flip,
        order=_order(config, mixture),
        rows=rows,
    )
