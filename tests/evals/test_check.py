"""All that evaluators need is checked before a run begins."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cap_pretrain import evals, inputs, train
from cap_pretrain.checkpoints import earlier
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals import suite
from cap_pretrain.evals.base import Context
from cap_pretrain.evals.probes import attentive
from cap_pretrain.learners import build
from cap_pretrain.telemetry import console
from cap_pretrain.training.step import split_learner
from tests import toy
from tests.data.test_sources import write

KINDS = {  # what a dataset has besides images
    "captioned": ("captions",),
    "labelled": ("label",),
    "numbered": ("label_without_names",),
    "everything": ("captions", "label", "question"),
    "bare": (),
}
# Smaller than their defaults, so that an evaluation takes seconds.
SMALL = {
    **{"linear_probe": {"c": (1.0, 2.0)}, "few_shot": {"shots": (1,), "draws": 1}},
    **{"scene_captions": {"count": 4}, "attention_mass": {"count": 4}, "captions": {"count": 4}},
}
SMALL["map_probe"] = {"lr": (1e-3,), "weight_decay": (0.01,), "fit_batch": 4}
for _name in (
    *("retrieval", "composition", "zero_shot"),
    *("perplexity", "question_answers", "caption_scores"),
):
    SMALL[_name] = {"limit": 4}
LEARNERS = {"captioner": {}, "dual_encoder": {}, "classifier": {"classes": 2}, "rotation": {}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Datasets of all kinds with train and val, and one with train alone."""
    from tensorflow_datasets import features as f

    root = tmp_path_factory.mktemp("data")
    parts = {
        "captions": (f.Sequence(f.Text()), lambda i: [f"picture {i}", "a square"]),
        "label": (f.ClassLabel(names=["cat", "dog"]), lambda i: i % 2),
        "label_without_names": (f.Scalar(np.int64), lambda i: i % 2),
        "question": (f.Text(), lambda i: f"what is {i}?"),
    }

    def make(name, kind, **sizes):
        own = {part.removesuffix("_without_names"): parts[part] for part in KINDS[kind]}
        features = {"image": f.Image(), **{part: feature for part, (feature, _) in own.items()}}
        write(root, name, features, lambda i: {p: of(i) for p, (_, of) in own.items()}, sizes)

    for kind in KINDS:
        make(kind, kind, train=24, val=4)
    make("only_train", "everything", train=40)
    make("train_and_test", "everything", train=24, test=4)
    return root


def config(data, name, learner="captioner", split="train", **sections):
    c = toy.config(learner, LEARNERS[learner], data__dir=str(data), data__split=split)
    c.data.name = name
    c.evals = ConfigDict(sections)
    return c


@pytest.fixture(scope="module")
def built():
    """Return a function that gives the learner of a config, split; each kind is built once."""
    learners = {}

    def of(c, tokenizer):
        name = c.learner.name
        if name not in learners:
            learners[name] = split_learner(build(c, tokenizer.vocab_size, jax.random.key(0)))
        return learners[name]

    return of


def section(name):
    return evals.defaults(name, **SMALL.get(name, {}))


def refusal(c):
    """Return why `check` refuses a config, or ""."""
    try:
        suite.check(c)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", evals.REGISTRY)
def test_every_evaluator_is_checked_without_a_tokenizer(name, data):
    """Whatever a dataset lacks, the answer is a line that names the section."""
    for kind, learner in (
        ("bare", "captioner"),
        ("everything", "captioner"),
        ("numbered", "rotation"),
    ):
        why = refusal(config(data, kind, learner, mine=section(name)))
        assert not why or (why.startswith("evals.mine: ") and len(why.splitlines()) < 3), why
    why = refusal(config(data, "train_and_test", mine=section(name)))
    other = ("scene_captions", "attention_mass", "composition", "accuracy", "referring")
    if name not in other:
        assert why.endswith("Set data.eval_split or evals.mine.split.") and "test (4)" in why, why


@pytest.mark.parametrize(
    ("name", "kind", "learner", "options", "why"),
    [
        ("zero_shot", "captioned", "captioner", {}, "no class names"),
        ("zero_shot", "labelled", "captioner", {"classes": "gone.txt"}, "cannot read 'gone.txt'"),
        ("zero_shot", "labelled", "classifier", {}, "which a Classifier cannot"),
        ("retrieval", "labelled", "captioner", {}, "has no captions"),
        ("perplexity", "captioned", "dual_encoder", {}, "needs a captioner"),
        ("captions", "captioned", "dual_encoder", {}, "does not write"),
        ("caption_scores", "bare", "captioner", {}, "needs reference captions"),
        ("loss", "labelled", "captioner", {}, "has no text, which a Captioner needs"),
        ("loss", "captioned", "classifier", {}, "has no label, which a Classifier needs"),
        ("loss", "labelled", "classifier", {"unigram": True}, "loss.unigram is for captions"),
        ("accuracy", "captioned", "classifier", {}, "has no label, which accuracy needs"),
        ("question_answers", "captioned", "captioner", {}, "needs questions"),
        ("knn", "captioned", "captioner", {}, "has no labels"),
        ("knn", "labelled", "captioner", {"layer": "blok_0"}, "no layer 'blok_0'. Did you"),
        ("knn", "labelled", "captioner", {"train_split": "trian"}, "no split 'trian'"),
        ("few_shot", "labelled", "captioner", {"train_limit": 3}, "too few to hold out"),
        ("composition", "bare", "captioner", {"questions": "order"}, "yields no questions"),
        ("composition", "bare", "captioner", {"questions": "sugarcrepe"}, "no folder"),
    ],
)
def test_what_is_missing_is_told_at_once(name, kind, learner, options, why, data):
    found = refusal(config(data, kind, learner, mine=evals.defaults(name, **options)))
    assert found.startswith("evals.mine: ") and why in found, found


def test_a_missing_program_is_told_at_once(data, monkeypatch):
    monkeypatch.setenv("PATH", "")
    mine = evals.defaults("caption_scores", tokenizer="ptb")
    assert "no java on the PATH" in refusal(config(data, "captioned", mine=mine))


# Referring expressions need regions, which no dataset here has; see test_referring.py.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in evals.REGISTRY if name != "referring"])
def test_what_is_accepted_can_be_evaluated(name, data, built, tokenizer_path, monkeypatch):
    """No evaluation finds a mistake that the check could have found."""
    monkeypatch.setattr(attentive, "LEAST_STEPS", 2)
    accepted = 0
    for kind in KINDS:
        for learner in LEARNERS:
            c = config(data, kind, learner, mine=section(name))
            if refusal(c):
                continue
            tokenizer = inputs.open_tokenizer(c, tokenizer_path)
            graphdef, *variables = built(c, tokenizer)
            context = Context(c, graphdef, tokenizer, sharding.make_mesh(c))
            evaluator = evals.evaluator_class(name)(context, evals.options(name, c.evals.mine))
            assert evaluator(tuple(variables)).metrics
            accepted += 1
    assert accepted


@pytest.mark.parametrize("start", [train.dry_run, train.run])
def test_a_run_and_its_plan_say_so_before_anything_is_written(start, data, tmp_path):
    c = config(data, "train_and_test", val=section("loss"))
    with pytest.raises(UserError, match=r"evals.val: dataset .*: no split 'val'; it has train"):
        start(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_dataset_without_a_validation_split_gets_one(data):
    c = config(data, "only_train", "classifier", val=section("loss"))

    def ids(split, **fields):
        c.data.update(fields)
        source = inputs.open_data(c, split)
        return {source[i]["id"] for i in range(len(source))}

    training, held_out = ids("train"), ids("val")
    assert len(training) == 38 and len(held_out) == 2 and not training & held_out
    assert inputs.completed(c, inputs.open_sources(c)).data.held_out == 2
    assert len(ids("train", held_out=5)) == 35 and len(ids("val")) == 5
    assert len(ids("train", held_out=0)) == 40
    c.data.held_out = -1
    (line,) = inputs.held_out(c, inputs.open_sources(c))
    assert "2 of its 40 examples are held out of training" in line and "\n" not in line
    assert inputs.held_out(c, []) == [line]  # of an evaluation
    for fields in ({"fraction": 0.5}, {"class_min": 1, "class_max": 5}, {"name": "only_train:2"}):
        assert ids("train", **fields) <= training and ids("val") == held_out
    assert not refusal(c)
    # A part of train may contain held-out examples.
    assert "no split 'val'" in refusal(
        config(data, "only_train", mine=section("loss"), split="train[:50%]")
    )
    knn = evals.defaults("knn", train_split="train[:50%]")
    assert "train_split: 'train[:50%]' overlaps" in refusal(config(data, "only_train", mine=knn))
    c.data.update({"class_min": 0, "class_max": 0, "eval_split": "train[:10%]"})
    assert len(ids("train")) == 40 and not inputs.held_out(c, inputs.open_sources(c))
    assert len(ids(c.data.eval_split)) == 4 and not refusal(c)


def test_every_dataset_of_a_mixture_is_evaluated_and_tiny_ones_are_named(data, capsys):
    c = config(
        data, "captioned:2+everything+bare", val=section("loss"), kinds=section("composition")
    )
    with console.used():
        checked = suite.check(c)
    assert {name: own.data for name, own in checked.evals.items()} == {
        "val": "", "val_everything": "everything", "kinds": "", "kinds_everything": "everything"
    }  # fmt: skip
    assert checked.evals.is_locked and "val_everything" not in c.evals
    said = capsys.readouterr().out
    assert "bare is not evaluated as evals.val_bare: " in said and "has no text" in said
    assert said.count("has only 4 examples, so figures vary by chance") == 3, said
    single = config(data, "captioned", val=section("loss"))
    assert suite.check(single) is single


def test_a_start_that_failed_binds_nothing(tmp_path):
    """An evaluation that wrote its config and no result may be started with another config."""
    c, other = (toy.config(total_steps=0, seed=seed) for seed in (1, 2))
    train.keep_config(c, tmp_path, 0)
    assert earlier.allowed_changes(other, tmp_path, ()) == []
    (tmp_path / "evals" / "val").mkdir(parents=True)
    (tmp_path / "evals" / "val" / "0.json").write_text(json.dumps({"loss": 1}))
    with pytest.raises(UserError, match="seed was 1, is now 2"):
        earlier.allowed_changes(other, tmp_path, ())
