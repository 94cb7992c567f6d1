"""What a run reads, from its config: the tokenizer that it makes, keeps and is bound to."""

import pytest

from cap_pretrain import config as configs
from cap_pretrain import inputs, train
from cap_pretrain.checkpoints.load import load_learner
from cap_pretrain.data.text.words import Rules, WordTokenizer, write_words
from cap_pretrain.errors import UserError
from tests import toy


@pytest.fixture
def of_words():
    return toy.config(text__kind="words", total_steps=1, data__scenes__length_train=60)


def test_a_run_counts_the_words_of_all_captions(of_words, tmp_path):
    of_words.text.words.min_count = 30
    tokenizer = inputs.prepare_tokenizer(
        of_words, inputs.open_sources(of_words), tmp_path, anew=False
    )
    assert isinstance(tokenizer, WordTokenizer)
    assert [p.name for p in (tmp_path / "tokenizer").iterdir()] == ["words.tsv"]
    text = (tmp_path / inputs.WORDS_FILE).read_text()
    assert "# captions: 300\n" in text and "# min_count: 30\n" in text  # five an image
    assert tokenizer.vocab_size == text.count("\t") > 10


def test_a_checkpoint_is_bound_to_its_words(of_words, tmp_path):
    words = write_words(["a red star", "a blue star"], tmp_path, Rules())
    toy.saved_run(of_words, tmp_path / "run", words, 3)
    learner = load_learner(tmp_path / "run")
    assert learner.tokenizer.vocab_size == 7
    path = tmp_path / "run" / inputs.WORDS_FILE
    path.write_text(words.read_text().replace("captions: 2", "captions: 3"))
    with pytest.raises(UserError, match="words.tsv: is not the file that the run was trained with"):
        load_learner(tmp_path / "run")


def test_a_file_of_words_brings_its_own_rules(tmp_path):
    given = write_words(["A red star, a star"], tmp_path, Rules(drop_letters=True), lower=False)
    c = toy.config(text__tokenizer=str(given))  # kind stays sentencepiece: the file decides
    tokenizer = inputs.prepare_tokenizer(c, [], tmp_path / "run", anew=True)
    assert tokenizer.decode(tokenizer.encode("A red star. a Star")) == "red star <unk>"
    assert (tmp_path / "run" / inputs.WORDS_FILE).read_bytes() == given.read_bytes()


def test_the_tokenizer_of_a_run_that_never_saved_leaves_no_trace(
    of_words, tokenizer_path, tmp_path
):
    mixture = inputs.open_sources(of_words)
    inputs.prepare_tokenizer(of_words, mixture, tmp_path, anew=True)
    of_words.text.tokenizer = str(tokenizer_path)
    inputs.prepare_tokenizer(of_words, mixture, tmp_path, anew=True)
    assert inputs.tokenizer_path(tmp_path) == tmp_path / inputs.TOKENIZER_FILE
    assert not (tmp_path / inputs.WORDS_FILE).exists()


def test_a_plan_counts_words(of_words, tmp_path):
    planned = train.dry_run(of_words, tmp_path)
    tokenizer = inputs.prepare_tokenizer(
        of_words, inputs.open_sources(of_words), tmp_path / "run", anew=True
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
def test_fields_that_are_wrong(field, value, message):
    with pytest.raises(UserError, match=message):
        configs.validate(toy.config(**{field: value}))


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
    (told,) = inputs.describe(c, mixture)
    assert "2 of 3 classes, 2 at the cap of 4" in told and told.endswith(": 4 examples.")


def test_datasets_that_are_not_the_runs_own_keep_their_classes(monkeypatch):
    c = toy.config("classifier", data__class_max=1)
    c.data.name = "mine"
    monkeypatch.setattr(inputs, "open_source", lambda name, split, **_: [{"image": name}])
    monkeypatch.setattr(inputs.pipeline, "is_features", lambda image: False)
    assert inputs.open_data(c, "val", "another") == [{"image": "another"}]
