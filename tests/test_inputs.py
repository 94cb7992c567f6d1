"""What a run reads according to its config: datasets and tokenizer."""

import json

import pytest

from cap_pretrain import inputs, train
from cap_pretrain.checkpoints.load import load_learner
from cap_pretrain.data.text.words import Rules, WordTokenizer, write_words
from cap_pretrain.errors import UserError
from cap_pretrain.training import feed
from cap_pretrain.validation import validate
from tests import toy


@pytest.fixture
def words_config():
    return toy.config(text__kind="words", total_steps=1, data__scenes__length_train=60)


def test_a_run_counts_the_words_of_all_captions(words_config, tmp_path):
    words_config.text.words.min_count = 30
    tokenizer = inputs.prepare_tokenizer(
        words_config, inputs.open_sources(words_config), tmp_path, anew=False
    )
    assert isinstance(tokenizer, WordTokenizer)
    assert [p.name for p in (tmp_path / "tokenizer").iterdir()] == ["words.tsv"]
    text = (tmp_path / inputs.WORDS_FILE).read_text()
    assert "# captions: 300\n" in text and "# min_count: 30\n" in text  # five per image
    assert tokenizer.vocab_size == text.count("\t") > 10


@pytest.mark.slow
def test_a_checkpoint_is_bound_to_its_words_file(words_config, tmp_path):
    words = write_words(["a red star", "a blue star"], tmp_path, Rules())
    toy.saved_run(words_config, tmp_path / "run", words, 3)
    learner = load_learner(tmp_path / "run")
    assert learner.tokenizer.vocab_size == 7
    path = tmp_path / "run" / inputs.WORDS_FILE
    path.write_text(words.read_text().replace("captions: 2", "captions: 3"))
    with pytest.raises(UserError, match="words.tsv: is not the file that the run was trained with"):
        load_learner(tmp_path / "run")


def test_a_words_file_keeps_its_own_rules(tmp_path):
    given = write_words(["A red star, a star"], tmp_path, Rules(drop_letters=True), lower=False)
    c = toy.config(text__tokenizer=str(given))  # the file takes precedence over text.kind
    tokenizer = inputs.prepare_tokenizer(c, [], tmp_path / "run", anew=True)
    assert tokenizer.decode(tokenizer.encode("A red star. a Star")) == "red star <unk>"
    assert (tmp_path / "run" / inputs.WORDS_FILE).read_bytes() == given.read_bytes()


def test_the_tokenizer_of_a_run_without_checkpoints_is_replaced(
    words_config, tokenizer_path, tmp_path
):
    mixture = inputs.open_sources(words_config)
    inputs.prepare_tokenizer(words_config, mixture, tmp_path, anew=True)
    words_config.text.tokenizer = str(tokenizer_path)
    inputs.prepare_tokenizer(words_config, mixture, tmp_path, anew=True)
    assert inputs.tokenizer_path(tmp_path) == tmp_path / inputs.TOKENIZER_FILE
    assert not (tmp_path / inputs.WORDS_FILE).exists()


def test_a_plan_counts_words(words_config, tmp_path):
    planned = train.dry_run(words_config, tmp_path)
    tokenizer = inputs.prepare_tokenizer(
        words_config, inputs.open_sources(words_config), tmp_path / "run", anew=True
    )
    assert f"vocabulary {tokenizer.vocab_size}\n" in planned
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["plan.json"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("text__kind", "word", "text.kind: 'word' is unknown.*words"),
        ("text__words__min_count", 0, "text.words.min_count"),
    ],
)
def test_invalid_fields_are_refused(field, value, message):
    with pytest.raises(UserError, match=message):
        validate(toy.config(**{field: value}))


def labels(source):
    return [source.without_image(i)["label"] for i in range(len(source))]


def test_all_splits_of_a_run_have_the_classes_of_its_training_split():
    c = toy.config("classifier", data__scenes__length_train=40, data__scenes__length_val=30)
    c.data.scenes.label = "count"
    whole = {split: labels(inputs.open_data(c, split)) for split in ("train", "val")}
    sizes = [whole["train"].count(label) for label in range(3)]
    smallest = sizes.index(min(sizes))
    c.data.class_min, c.data.class_max = sorted(sizes)[1], 4
    c.data.fraction = 0.5
    (source, _), *_ = mixture = inputs.open_sources(c)
    others = [name for label, name in enumerate("123") if label != smallest]
    test = inputs.open_data(c, "val")
    assert source.class_names == test.class_names == others
    assert sorted(labels(source)) == [0, 0, 1, 1], "half of four of each"
    kept = [label for label in whole["val"] if label != smallest]
    assert [others[label] for label in labels(test)] == [str(label + 1) for label in kept]
    assert inputs.completed(c, mixture).learner.classes == 2
    (line,) = feed.describe(c, mixture)
    assert "2 of 3 classes, 2 at the cap of 4" in line and line.endswith(": 4 examples.")


def test_datasets_of_evaluators_keep_their_classes(monkeypatch):
    c = toy.config("classifier", data__class_max=1)
    c.data.name = "mine"
    monkeypatch.setattr(inputs, "open_source", lambda name, split, **_: [{"image": name}])
    monkeypatch.setattr(inputs.views, "is_features", lambda image: False)
    assert inputs.open_data(c, "val", "another") == [{"image": "another"}]


def test_what_is_not_trained_on_gets_the_share_of_a_process(monkeypatch):
    budgets = []
    c = toy.config("classifier", data__class_max=1, data__order="blocks", data__cache_gb=8)
    c.data.name = "mine"
    monkeypatch.setattr(inputs, "open_source", lambda *_, cache, **__: budgets.append(cache.budget))
    monkeypatch.setattr(inputs.cluster, "processes", lambda: 4)
    monkeypatch.setattr(inputs.subset, "labels_of", lambda source: source)
    inputs._labels(json.dumps(c.data.to_dict()), "train", "mine")
    inputs._open_unrestricted(c.data, "train", "mine", 0.5)
    assert budgets == [2e9, 4e9]
