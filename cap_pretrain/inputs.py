"""From a config to what a run reads: datasets, tokenizer, batches."""

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grain
import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from cap_pretrain import files, learners
from cap_pretrain.data import pipeline, sources, subset, tokenizers, words
from cap_pretrain.data.sources import Source
from cap_pretrain.errors import UserError

# Examples of each dataset whose captions a new tokenizer is trained on.
TOKENIZER_EXAMPLES = 50_000

# Who belongs to a fraction of a dataset is the same for every run that is compared.
FRACTION_SEED = 0

Mixture = list[tuple[Source, float]]


def open_data(config: ConfigDict, split: str, name: str = "") -> Source:
    """Opens a dataset as `config.data` says; by default the (first of the) run's own."""
    return sources.open_source(
        name or sources.parse_mixture(config.data.name)[0][0],
        split,
        image_size=config.data.image_size,
        data_dir=config.data.dir,
        fields=config.data.fields.to_dict(),
        scenes=config.data.scenes.to_dict(),
    )


def open_sources(config: ConfigDict) -> Mixture:
    """Opens the members of the training mixture, with their weights.

    Raises:
      UserError: a dataset is missing, or lacks what the learner reads.
    """
    reads = learners.learner_class(config.learner.name).reads
    members = []
    for name, weight in sources.parse_mixture(config.data.name):
        source = open_data(config, config.data.split, name)
        example = source[0]
        for part, missing in (("text", not example["captions"]), ("label", example["label"] < 0)):
            if part in reads and missing:
                raise UserError(
                    f"data.name: {source} has no {part}, which a {config.learner.name} learns "
                    "from; name another dataset or set data.fields."
                )
        members.append((subset.fraction_of(source, config.data.fraction, FRACTION_SEED), weight))
    return members


def count_classes(config: ConfigDict, mixture: Mixture) -> ConfigDict:
    """Returns the config with `learner.classes` as the data has it, where that is a field and 0."""
    if config.learner.get("classes", None) != 0 or not mixture:
        return config
    config = config.copy_and_resolve_references()
    config.learner.classes = len(mixture[0][0].class_names)
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
    if jax.process_index() == 0 and (anew or not tokenizer_path(workdir).exists()):
        _make_tokenizer(config, mixture, workdir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("tokenizer")
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


def expected_vocab_size(config: ConfigDict, mixture: Mixture) -> int:
    """The vocabulary that `prepare_tokenizer` will give; pieces to be trained as many as asked."""
    if not config.text.tokenizer and config.text.kind != "words":
        return config.text.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        return prepare_tokenizer(config, mixture, Path(folder), anew=True).vocab_size


def tokenizer_identity(workdir: Path) -> dict[str, str]:
    """What binds a checkpoint to the run's tokenizer: its file and the SHA-256 of that."""
    path = tokenizer_path(workdir)
    if not path.exists():
        return {}
    name = path.relative_to(workdir).as_posix()
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()}


def training_batches(
    config: ConfigDict, mixture: Mixture, tokenizer: tokenizers.Tokenizer
) -> grain.MapDataset:
    """The dataset whose element t is this host's slice of batch t."""
    return pipeline.train_dataset(
        mixture,
        tokenizer,
        image_size=config.data.image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        crop=config.data.crop,
        flip=config.data.flip,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
