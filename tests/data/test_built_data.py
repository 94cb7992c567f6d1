"""From published files to a run: build a dataset, train on it, evaluate on it."""

import functools
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cap_pretrain import evals, inputs, learners, train
from cap_pretrain.data.builders import ALIASES, FORMATS
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer
from cap_pretrain.distributed import sharding
from cap_pretrain.training import feed, step
from tests import tiny, toy
from tests.data import test_webdataset as web
from tests.data.test_flickr import published as flickr  # noqa: F401 - a fixture
from tests.data.test_openimages import published as openimages  # noqa: F401 - a fixture
from tests.data.test_question_formats import (  # noqa: F401 - fixtures
    build,
    gqa_question,
    karpathy,
    vqav2,
    write_json,
)
from tests.data.test_region_formats import refcoco, visual_genome  # noqa: F401 - fixtures
from tests.data.test_tables import photos
from tests.data.test_vizwiz import published as vizwiz  # noqa: F401 - a fixture
from tests.data.test_webdataset import samples, tar
from tests.tools.test_build_dataset import jpeg, write_captions, write_files

SIZES = {"train": {"cat": 12, "dog": 7, "emu": 2}, "val": {"cat": 2, "dog": 3, "emu": 4}}


# Build options of formats whose tests have no fixture.


def coco_captions(tmp_path):
    names = {k: f"COCO_train2014_{k:012d}.jpg" for k in range(3)}
    annotations = write_captions(
        tmp_path / "captions_train2014.json.gz", names, [(k, f"A dog, {k}.") for k in (0, 1, 2, 2)]
    )
    files = {f"train2014/{name}": jpeg(k) for k, name in names.items()}
    return "--annotations", annotations, "--images", write_files(tmp_path / "t.zip", files)


def table(tmp_path, suffix, mark):
    rows = [f"{k}.jpg{mark}caption {k}" for k in (1, 2, 3)]
    path = tmp_path / f"captions.{suffix}"
    path.write_text("\n".join([f"image{mark}caption", *rows]))
    return "--tables", path, "--images", photos(tmp_path)


def parquet(tmp_path):
    return web.by_files(tmp_path)


def conceptual(tmp_path, columns=("caption", "url"), *, by_tars):
    return web.by_img2dataset(tmp_path) if by_tars else web.by_list(tmp_path, columns, "crc32")


def webdataset(tmp_path):
    tar(tmp_path / "shards" / "00000.tar", samples(4))
    return "--shards", tmp_path / "shards"


def image_folder(tmp_path):
    files = {f"{name}/{k}.jpg": jpeg(k) for k, name in enumerate(("cat", "cat", "dog"))}
    return "--images", write_files(tmp_path / "train.zip", files)


def gqa(tmp_path):
    asked = {str(k): gqa_question(f"n{k}", "apple") for k in range(3)}
    files = {f"n{k}.jpg": jpeg(k) for k in range(3)}
    questions = write_json(tmp_path / "train_balanced_questions.json", asked)
    return "--questions", questions, "--images", write_files(tmp_path / "images", files)


def nlvr2(tmp_path):
    lines = [
        {"identifier": f"train-{k}-0-0", "sentence": f"There are {k} dogs.", "label": label}
        for k, label in enumerate(("True", "False"))
    ]
    path = tmp_path / "train.json"
    path.write_text("\n".join(map(json.dumps, lines)))
    files = {f"train-{k}-0-img{side}.png": jpeg(k, kind="PNG") for k in (0, 1) for side in (0, 1)}
    return "--questions", path, "--images", write_files(tmp_path / "images", files)


CAPTIONS = {
    "cc3m, listed": functools.partial(conceptual, by_tars=False),
    "cc3m, tars": functools.partial(conceptual, by_tars=True),
    "cc12m, listed": functools.partial(conceptual, columns=("url", "caption"), by_tars=False),
    "cc12m, tars": functools.partial(conceptual, by_tars=True),
    "webdataset": webdataset,
    "tsv": functools.partial(table, suffix="tsv", mark="\t"),
    "csv": functools.partial(table, suffix="csv", mark=","),
    "table": functools.partial(table, suffix="csv", mark=","),
    "parquet": parquet,
    "captions_json": coco_captions,
    "coco_captions": coco_captions,
    "karpathy": "karpathy",
    "flickr": "flickr",
    "flickr8k": "flickr",
    "flickr30k": "flickr",
    "vizwiz": "vizwiz",
}
QUESTIONS = {"vqav2": "vqav2", "gqa": gqa, "nlvr2": nlvr2}
LABELS = {"image_folder": image_folder, "openimages": "openimages"}
REGIONS = {"refcoco": "refcoco", "visual_genome": "visual_genome"}


def test_all_formats_are_tried():
    tried = {name.partition(",")[0] for name in (CAPTIONS | QUESTIONS | LABELS | REGIONS)}
    assert tried == {*FORMATS, *(name for names in ALIASES.values() for name in names)}


class Trainer:
    """Run steps of a toy learner, compiled once, on the named dataset."""

    def __init__(self, learner, options, tokenizer):
        self._config = c = tiny.config(learner, options, depth=1, decoder_depth=1)
        c.batch_size, c.text.length, c.optim.name = 2, tokenizer.max_len, "adamw"
        self._tokenizer = tokenizer
        vocab = tokenizer.vocab_size
        _, abstract, graphdef, tx, rate, self._mesh = toy.prepared(c, vocab)
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self._step = step.make_train_step(graphdef, tx, rate, c, self._shardings)
        self._state = jax.device_get(tiny.state(c, tx, vocab))

    def two_steps(self, folder):
        """Return the batches and losses of two steps from the same initial state."""
        c = self._config
        c.data.name = str(folder)
        mixture = inputs.open_sources(c)
        dataset = feed.training_batches(c, mixture, self._tokenizer)
        reads = (*learners.learner_class(c.learner.name).reads, "broken")
        batches, losses = [dataset[0], dataset[1]], []
        state = jax.device_put(self._state, self._shardings)
        for batch in batches:
            arrays = sharding.put_batch({key: batch[key] for key in reads}, self._mesh)
            state, metrics = self._step(state, arrays)
            losses.append(float(metrics["loss"]))
        assert int(state.step) == 2 and np.isfinite(losses).all()
        return batches


@pytest.fixture(scope="module")
def captioner(tokenizer_path):
    return Trainer("captioner", None, SentencePieceTokenizer(tokenizer_path, 16))


@pytest.fixture(scope="module")
def locca(tokenizer_path):
    return Trainer("locca", {"bins": 5}, SentencePieceTokenizer(tokenizer_path, 16))


@pytest.fixture(scope="module")
def classifier(tokenizer_path):
    return Trainer("classifier", {"classes": 4}, SentencePieceTokenizer(tokenizer_path, 16))


def built(name, recipe, tmp_path, request):
    """Build a dataset from the fixture of its format; return its folder."""
    named = isinstance(recipe, str)
    arguments = request.getfixturevalue(recipe) if named else recipe(tmp_path)
    return build(tmp_path, name.partition(",")[0], *arguments)


@pytest.mark.parametrize(("name", "recipe"), CAPTIONS.items(), ids=CAPTIONS)
def test_captions_of_every_format_are_trained_on(name, recipe, tmp_path, request, captioner):
    for batch in captioner.two_steps(built(name, recipe, tmp_path, request)):
        assert not batch["broken"].any() and not batch["prompt"].any()
        assert (batch["text"][:, :2] > 0).all() and batch["image"].std() > 10


@pytest.mark.parametrize(("name", "recipe"), QUESTIONS.items(), ids=QUESTIONS)
def test_questions_of_every_format_are_trained_on(name, recipe, tmp_path, request, captioner):
    for batch in captioner.two_steps(built(name, recipe, tmp_path, request)):
        given = batch["prompt"]
        assert not batch["broken"].any() and (given > 0).all()
        answers = batch["text"][np.arange(2), np.minimum(given, 15)]
        assert (answers > 0).all() and batch["image"].std() > 10


@pytest.mark.parametrize(("name", "recipe"), LABELS.items(), ids=LABELS)
def test_labels_of_every_format_are_trained_on(name, recipe, tmp_path, request, classifier):
    for batch in classifier.two_steps(built(name, recipe, tmp_path, request)):
        assert not batch["broken"].any() and (batch["label"] >= 0).all()
        assert batch["image"].std() > 10


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), REGIONS.items(), ids=REGIONS)
def test_regions_of_every_format_are_trained_on(name, recipe, tmp_path, request, locca):
    for batch in locca.two_steps(built(name, recipe, tmp_path, request)):
        assert not batch["broken"].any() and batch["phrases"][:, 0, :2].all()
        assert (batch["boxes"][..., 2:] > batch["boxes"][..., :2]).all()


def classes_that_differ_in_size(tmp_path):
    """Return a dataset whose classes differ in size."""
    arguments = {"--labels": [], "--images": []}
    names = {name: f"/m/0{name}" for name in SIZES["train"]}
    for split, sizes in SIZES.items():
        own = [name for name, size in sizes.items() for _ in range(size)]
        lines = [f"{k:016x},verification,{names[name]},1" for k, name in enumerate(own)]
        labels = tmp_path / f"{split}.csv"
        labels.write_text("\n".join(["ImageID,Source,LabelName,Confidence", *lines]) + "\n")
        photos = {f"{k:016x}.jpg": jpeg(k) for k in range(len(own))}
        arguments["--labels"].append(f"{split}={labels}")
        arguments["--images"].append(f"{split}={write_files(tmp_path / split, photos)}")
    (tmp_path / "classes.csv").write_text("".join(f"{m},{name}\n" for name, m in names.items()))
    flat = [a for flag, values in arguments.items() for a in (flag, *values)]
    return build(tmp_path, "openimages", *flat, "--classes", tmp_path / "classes.csv")


@pytest.mark.slow
def test_learner_and_evaluators_see_the_same_classes(tmp_path, capsys):
    c = toy.config("classifier", data__class_min=5, data__class_max=10)
    c.data.name = str(classes_that_differ_in_size(tmp_path))
    probes = {
        name: evals.defaults(name, when="end") for name in ("accuracy", "linear_probe", "knn")
    }
    c.evals = ConfigDict(probes)
    train.run(c, tmp_path / "run")
    told = capsys.readouterr().out
    assert "2 of 3 classes, 1 at the cap of 10 (seed 0): 17 examples." in told
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["learner"]["classes"] == 2
    for name in c.evals:
        result = json.loads((tmp_path / "run" / "evals" / name / "2.json").read_text())
        assert result["images"] == 5, "the emus are left out"
        if name != "accuracy":
            assert (result["classes"], result["train_split"]) == (2, "train")
