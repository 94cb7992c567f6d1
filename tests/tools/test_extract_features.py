"""Tests of tools/extract_features.py: training on features equals a frozen encoder's training."""

import json

import jax
import numpy as np
import pytest

from cap_pretrain import inputs
from cap_pretrain.checkpoints.load import Learner
from cap_pretrain.cli.captioning import captioner
from cap_pretrain.commands import contact_sheet, extract_features
from cap_pretrain.data.builders import features
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import Context, ScoringOptions
from cap_pretrain.evals.captions import Captions
from cap_pretrain.evals.inference.captioning import Captioning
from cap_pretrain.evals.inference.scoring import Scoring
from cap_pretrain.models.decoding import Decoding
from cap_pretrain.training import feed, plan
from cap_pretrain.training.step import make_train_step
from cap_pretrain.validation import validate
from tests import toy
from tests.tools import test_build_dataset as images

FROZEN = (("encoder/.*", 0.0),)
COUNT, BATCH = 20, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a dataset of captioned images with splits train and val."""
    folder = tmp_path_factory.mktemp("images")
    files = {f"{i}.jpg": images.jpeg(i) for i in range(COUNT)}
    photos = images.write_files(folder / "photos", files)
    captions = [
        (i, f"a {['red', 'blue', 'green'][i % 3]} star, {k}") for i in range(COUNT) for k in "ab"
    ]
    annotations = images.write_captions(
        folder / "captions.json", {i: f"{i}.jpg" for i in range(COUNT)}, captions
    )
    by_split = [f"{split}={annotations}" for split in ("train", "val")]
    arguments = ["--out", folder, "--images", photos, "--annotations", *by_split]
    assert images.run("captions_json", "--name", "mine", *arguments) == 0
    return folder / "mine"


def config(data, **fields):
    c = toy.config(data__name=str(data), total_steps=3, batch_size=BATCH, **fields)
    c.optim.update(dict(warmup_share=0.0, lr=0.01))
    return c


@pytest.fixture(scope="module")
def run(data, tokenizer_path, tmp_path_factory):
    """Return a captioner's workdir and the random parameters saved in it."""
    workdir = tmp_path_factory.mktemp("captioner") / "run"
    return workdir, toy.saved_run(config(data), workdir, tokenizer_path, 3).params


def extract(run, data, out, *more, what="tokens", name="stored"):
    arguments = ["--encoder", run[0], "--data", data, "--out", out, "--name", name, "--what", what]
    return extract_features.main([str(a) for a in (*arguments, *more)])


@pytest.fixture(scope="module")
def stored(run, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("stored")
    assert extract(run, data, out) == 0
    return out / "stored"


def of_features(stored, **fields):
    """Return the config of the same captioner on stored features."""
    c = config(stored, model__name="stored", optim__lr_rules=FROZEN, **fields)
    c.model.update(dict(decoder_width=64, decoder_depth=1, decoder_mlp=256, decoder_heads=2))
    validate(c)
    return inputs.completed(c, inputs.open_sources(c))


def trained(c, params, tokenizer):
    """Return the losses of three steps, and the captions before them."""
    init, abstract, graphdef, tx, rate, mesh = toy.prepared(c, tokenizer.vocab_size)
    given = {part: params[part] for part in abstract.params}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = init().replace(params=jax.device_put(given, shardings.params))
    context = Context(c, graphdef, tokenizer, mesh)
    captioning = Captioning(context, context.source(), batch_size=8, limit=None, how=Decoding())
    captions = dict(captioning(state.variables))
    train_step = make_train_step(graphdef, tx, rate, c, shardings)
    batches = feed.training_batches(c, inputs.open_sources(c), tokenizer)
    losses = []
    for step in range(3):
        batch = {k: batches[step][k] for k in ("image", "text", "broken", "prompt")}
        state, metrics = train_step(state, sharding.put_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    return losses, captions


@pytest.mark.slow
def test_training_on_features_equals_training_on_images(run, data, stored, tokenizer_path):
    from_images = config(data, optim__lr_rules=FROZEN, encoder=str(run[0]))
    from_features = of_features(stored)
    assert (from_features.model.width, from_features.model.tokens) == (64, 4)
    tokenizer = inputs.open_tokenizer(from_images, tokenizer_path)
    losses, captions = trained(from_images, run[1], tokenizer)
    assert len(set(losses)) == 3 and len(captions) == COUNT and len(set(captions.values())) > 5
    got = trained(from_features, run[1], tokenizer)
    np.testing.assert_allclose(got[0], losses, rtol=1e-6)
    assert got[1] == captions


def test_the_dataset_is_that_of_the_images_with_features_in_their_place(run, data, stored):
    for split in ("train", "val"):
        old, new = (open_source(str(d), split, image_size=16) for d in (data, stored))
        assert len(new) == len(old) == COUNT
        for before, after in zip(old, new, strict=True):
            assert before.keys() == after.keys()
            assert all(before[k] == after[k] for k in before if k != "image")
            assert after["image"].shape == (5, 64) and after["image"].dtype == np.float32
            # The pooled vector is the mean of the tokens.
            np.testing.assert_allclose(after["image"][0], after["image"][1:].mean(0), atol=1e-5)
    made = json.loads((stored / "1.0.0" / "made.json").read_text())
    assert made["encoder"] == f"step 3 of {run[0]}" and made["shape"] == [5, 64]
    assert made["splits"]["val"] == {"examples": COUNT, "left_out": []}
    assert len(made["weights"]) == 64 and made["model"]["name"] == "mu/8"


def test_pooled_vectors_in_half_precision(run, data, stored, tmp_path, capsys):
    arguments = ("--dtype", "float16", "--splits", "val[:3]", "--batch_size", 2)
    assert extract(run, data, tmp_path, *arguments, what="pooled") == 0
    output = capsys.readouterr().out
    assert "val: 3 of 3 images, [1, 64] float16 each" in output and "images/s" in output
    small, whole = (
        open_source(str(d), "val", image_size=16) for d in (tmp_path / "stored", stored)
    )
    for a, b in zip(small, (whole[k] for k in range(3)), strict=True):
        assert a["image"].dtype == np.float16
        np.testing.assert_allclose(a["image"], b["image"][:1], atol=2e-2, rtol=1e-3)


TILES = dict(crop=24, cell=8, tile=8, permutations=2, hidden=(12,))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learner", "options", "side", "width"),
    [("jigsaw", TILES, 24, 12), ("dual_encoder", {}, 16, 64)],
)
def test_layers_after_the_encoder(
    learner, options, side, width, data, tokenizer_path, tmp_path, capsys
):
    c = config(data, learner=learner, options=options, data__image_size=side)
    params = toy.saved_run(c, tmp_path / "run", tokenizer_path, 3).params
    arguments = ("--splits", "val[:3]")
    assert extract((tmp_path / "run",), data, tmp_path, *arguments, what="head") == 0
    assert f"val: 3 of 3 images, [1, {width}] float32" in capsys.readouterr().out
    tokenizer = inputs.open_tokenizer(c, tokenizer_path)
    _, _, graphdef, _, _, mesh = toy.prepared(c, tokenizer.vocab_size)
    context = Context(c, graphdef, tokenizer, mesh)
    ((batch, _),) = context.batches(inputs.open_data(c, "val[:3]"), 3)
    expected = context.jit(lambda learner, images: learner.features(images))(
        (params, {}), batch["image"]
    )
    got = open_source(str(tmp_path / "stored"), "val", image_size=side)
    for vector, example in zip(expected, got, strict=True):
        np.testing.assert_allclose(example["image"], vector[None], rtol=1e-4, atol=1e-5)


class WithBroken:
    """A source whose images at the indices `broken` cannot be decoded."""

    def __init__(self, source, broken):
        self._source, self._broken, self.class_names = source, broken, []

    def __len__(self):
        return len(self._source)

    def __getitem__(self, i):
        return self._source[i] | ({"image": b"none"} if i in self._broken else {})


@pytest.mark.parametrize("broken", [(0, 7, 19), range(COUNT)])
def test_images_that_cannot_be_decoded_are_skipped(
    run, data, tmp_path, monkeypatch, capsys, broken
):
    real = inputs.open_data
    monkeypatch.setattr(inputs, "open_data", lambda *a: WithBroken(real(*a), broken))
    code = extract(run, data, tmp_path, "--splits", "train")
    if len(broken) == COUNT:
        assert code == 2 and "no image that can be decoded" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
        return
    assert code == 0 and "train: 17 of 20 images" in capsys.readouterr().out
    source = open_source(str(data), "train", image_size=16)
    made = json.loads((tmp_path / "stored" / "1.0.0" / "made.json").read_text())
    assert made["splits"]["train"]["left_out"] == [source[i]["id"] for i in broken]
    new = open_source(str(tmp_path / "stored"), "train", image_size=16)
    assert [e["id"] for e in new] == [source[i]["id"] for i in range(COUNT) if i not in broken]


def test_a_crash_leaves_nothing_that_looks_finished(run, data, tmp_path, monkeypatch):
    def crash(*_):
        raise RuntimeError("power cut")

    monkeypatch.setattr(features.FeatureDataset, "finish", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        extract(run, data, tmp_path, "--splits", "val")
    assert not list(tmp_path.iterdir())


def test_error_messages(run, data, stored, tmp_path, capsys):
    assert extract(run, data, tmp_path, what="head") == 2
    assert (
        "--what: head, but a learner 'captioner' has no layers after its encoder"
        in capsys.readouterr().err
    )
    for arguments, message in [
        ((run, data, stored.parent), "exists already; add --overwrite"),
        ((run, stored, tmp_path), "holds features of another encoder"),
        ((("nowhere",), data, tmp_path), "nowhere"),
        ((run, data, tmp_path, "--splits", "val", "val[:3]"), "names one split twice"),
        ((run, data, tmp_path, "--fields", "pictures=image"), "--fields: 'pictures=image'"),
    ]:
        assert extract(*arguments) == 2
        captured = capsys.readouterr().err
        assert message in captured and captured.count("\n") <= 2
    assert not list(tmp_path.iterdir())


def test_shards_labels_questions_and_regions(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_SHARD_BYTES", 300)
    regions = [("a dog", (0.25, 0.0, 1.0, 0.5)), ("é", (0.0, 0.0, 0.5, 1.0))]
    example = {"captions": ["two"], "label": 1, "question": "how many?", "regions": regions}
    dataset = features.FeatureDataset(
        tmp_path / "mine" / "1.0.0",
        like=example,
        shape=(2, 3),
        dtype="float32",
        class_names=["number", "colour"],
    )
    arrays = np.random.default_rng(0).standard_normal((7, 2, 3)).astype(np.float32)
    rows = [example | {"image": array, "id": str(k)} for k, array in enumerate(arrays)]
    split = dataset.write_split("train", iter(rows))
    assert len(split.shards) > 2 and sum(split.shards) == 7
    dataset.finish("", {})
    read = open_source(str(tmp_path / "mine"), "train", image_size=8)
    assert read.class_names == ["number", "colour"]
    for row, got in zip(rows, read, strict=True):
        np.testing.assert_array_equal(got.pop("image"), row.pop("image"))
        assert got == row


@pytest.mark.parametrize(("field", "value"), [("crop", "random"), ("flip", True)])
def test_features_are_not_augmented(stored, field, value):
    with pytest.raises(UserError, match=f"data.{field}: .*features cannot be augmented"):
        of_features(stored, **{f"data__{field}": value})


def test_features_and_images_are_not_confused(data, stored):
    with pytest.raises(UserError, match="holds features of another encoder.*model.name=stored"):
        inputs.open_sources(config(stored))
    with pytest.raises(UserError, match="stored is for features, but .* holds images"):
        inputs.open_sources(config(data, model__name="stored"))


def test_evaluators_and_tools_that_need_pixels_say_so(stored, tokenizer_path, tmp_path, capsys):
    c = of_features(stored)
    tokenizer = inputs.open_tokenizer(c, tokenizer_path)
    init, _, graphdef, _, _, mesh = toy.prepared(c, tokenizer.vocab_size)
    context, variables = Context(c, graphdef, tokenizer, mesh), init().variables
    result = Captions(context, Captions.Options(count=2))(variables)
    assert len(result.details["samples"]) == 2 and not result.pictures
    scoring = Scoring(context, ScoringOptions(batch_size=2, pairs=4))
    with pytest.raises(UserError, match="for a blank image, and the run reads stored features"):
        scoring.prior(variables, np.zeros((1, 8), np.int32))
    with pytest.raises(UserError, match="trained on stored features .* has no image encoder"):
        captioner(Learner(c, tokenizer, graphdef, variables), Decoding(), 2, seed=0)
    assert contact_sheet.main(["--data", str(stored), "--out", str(tmp_path / "a.png")]) == 2
    assert "no images to show" in capsys.readouterr().err


def test_a_plan_knows_the_shape_of_features(stored, data):
    forward = plan.flops_per_example(of_features(stored), 100)["forward"]
    assert 0 < forward < plan.flops_per_example(config(data), 100)["forward"]
