"""Tests of tools/plot_embeddings.py: embeddings, their coordinates, figures, error messages."""

import collections
import functools

import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cap_pretrain import inputs
from cap_pretrain.checkpoints.open import open_learner
from cap_pretrain.commands import plot_embeddings
from cap_pretrain.commands.plot_embeddings import places, principal_components
from cap_pretrain.data.text import tokenizers
from cap_pretrain.errors import UserError
from cap_pretrain.evals.inference import word_maps
from cap_pretrain.models.layers import normalize_images
from tests import tiny, toy
from tests.evals import stubs
from tests.tools.drawing import words_in


@pytest.fixture(scope="module")
def runs(tokenizer_path, tmp_path_factory):
    """Return workdirs of one-layer learners by kind."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("captioner", "dual_encoder"):
        c = toy.config(kind, model__depth=1, data__scenes__length_val=12)
        toy.saved_run(c, folder / kind, tokenizer_path, 3)
    return {kind: folder / kind for kind in ("captioner", "dual_encoder")}


@pytest.fixture(scope="module", autouse=True)
def read():
    """Load each run once."""
    with pytest.MonkeyPatch.context() as patch:
        read = functools.cache(open_learner)
        patch.setattr(plot_embeddings, "open_learner", read)
        yield lambda run: read(run, step=None)


def opened(learner):
    """Return the learner as a module, its tokenizer and its source."""
    config, tokenizer, graphdef, variables = learner
    return nnx.merge(graphdef, *variables), tokenizer, inputs.open_data(config, "val")


def plot(run, out, *arguments):
    return plot_embeddings.main(["--checkpoint", str(run), "--out", str(out), *arguments])


def test_axes_of_greatest_variance():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 5)) * (1, 7, 0.1, 3, 0.5) + 10
    two = principal_components(vectors, 2)
    for k, column in enumerate((1, 3)):
        assert abs(np.corrcoef(two[:, k], vectors[:, column])[0, 1]) > 0.95
    whole = principal_components(vectors, 9)
    assert whole.shape == (40, 5)
    apart = np.linalg.norm(whole[:, None] - whole, axis=-1)
    np.testing.assert_allclose(apart, np.linalg.norm(vectors[:, None] - vectors, axis=-1))
    np.testing.assert_allclose(principal_components(vectors[::-1], 2)[::-1], two, atol=1e-9)


@pytest.mark.slow
def test_alike_vectors_are_side_by_side():
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((30, 40)) + 20 * (np.arange(30) % 2)[:, None]
    for method in plot_embeddings.METHODS:
        xy = places(vectors, method)
        assert xy.shape == (30, 2)
        np.testing.assert_array_equal(xy, places(vectors, method))
        apart = np.linalg.norm(xy[:, None] - xy, axis=-1)
        same = np.arange(30) % 2 == np.arange(30)[:, None] % 2
        assert apart[same].max() < apart[~same].min()


def test_images_are_pooled_features(runs, read):
    learner = read(runs["captioner"])
    module, _, source = opened(learner)
    points = plot_embeddings.of_images(learner, source, 7)
    examples = [source[i] for i in range(7)]
    np.testing.assert_array_equal(points.images, [example["image"] for example in examples])
    np.testing.assert_array_equal(points.labels, [example["label"] for example in examples])
    pooled = module.encoder(normalize_images(points.images, np.float32)).pooled
    np.testing.assert_allclose(points.vectors, pooled, rtol=1e-4, atol=1e-5)


def test_captions_of_captioners_and_of_dual_encoders(runs, read):
    learner = read(runs["captioner"])
    module, tokenizer, source = opened(learner)
    texts = [tokenizer.encode(source[i]["captions"][0]) for i in range(6)]
    points = plot_embeddings.of_captions(learner, source, 6)
    table = np.asarray(module.decoder.embedding.embedding)
    expected = [table[ids[ids > tokenizer.eos_id]].mean(0) for ids in texts]
    np.testing.assert_allclose(points.vectors, expected, rtol=1e-5, atol=1e-6)

    learner = read(runs["dual_encoder"])
    points = plot_embeddings.of_captions(learner, source, 6)
    expected = opened(learner)[0].embed_text(np.stack(texts))
    np.testing.assert_allclose(points.vectors, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["captioner", "dual_encoder"])
def test_words_are_the_most_frequent_ones(runs, read, kind):
    learner = read(runs[kind])
    module, tokenizer, source = opened(learner)
    points = plot_embeddings.of_words(learner, source, 20)
    captions = [text for i in range(len(source)) for text in source[i]["captions"]]
    texts = (word_maps.words_of(tokenizer, tokenizer.encode(text))[1] for text in captions)
    counts = collections.Counter(word.text for words in texts for word in words)
    assert [counts[word] for word in points.words] == sorted(counts.values(), reverse=True)[:20]
    part = module.decoder if kind == "captioner" else module.text_tower
    table = np.asarray(part.embedding.embedding)
    several = 0
    for word, vector in zip(points.words, points.vectors, strict=True):
        ids = tokenizer.encode(word)
        ids = ids[ids > tokenizer.eos_id]
        several += len(ids) > 1
        np.testing.assert_allclose(vector, table[ids].mean(0), rtol=1e-5, atol=1e-6)
    assert several > 2


def test_words_and_class_names_are_written(runs, read, tmp_path, capsys):
    out = tmp_path / "out.svg"
    assert plot(runs["captioner"], out, "--what", "words", "--count", "9", "--method", "pca") == 0
    assert capsys.readouterr().out == f"wrote {out}: 9 words\n"
    written = words_in(out)
    assert len(written) == 9 and "a" in written
    assert plot(runs["captioner"], out, "--method", "pca") == 0
    source = opened(read(runs["captioner"]))[2]
    assert set(words_in(out)) == {source.class_names[source[i]["label"]] for i in range(12)}


@pytest.mark.slow
def test_the_same_picture_each_time_with_thumbnails(runs, tmp_path):
    out = tmp_path / "out.png"
    drawn = []
    for arguments in (["--thumbnails"], ["--thumbnails"], []):
        assert plot(runs["captioner"], out, "--what", "captions", *arguments) == 0
        drawn.append(out.read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]
    colors = Image.open(out).convert("RGB").getcolors(1 << 20)
    assert len(colors) > 10


def test_images_without_labels_and_of_many_classes():
    xy = np.random.default_rng(0).standard_normal((60, 2))
    images = tiny.images(60)

    def drawn(labels, names):
        points = plot_embeddings.Points(xy, np.array(labels), images)
        figure = plot_embeddings.draw(points, xy, names, thumbnails=False)
        return figure.axes[0].collections, figure.legends

    groups, legends = drawn([-1] * 60, [])
    assert len(groups) == 1 and not legends
    groups, legends = drawn(np.arange(60) % 12, [f"class {i}" for i in range(12)])
    assert [text.get_text() for text in legends[0].texts] == [f"class {i}" for i in range(12)]
    groups, legends = drawn(np.arange(60) % 30, [f"class {i}" for i in range(30)])
    assert not legends
    assert len({tuple(group.get_facecolor()[0]) for group in groups}) == 30


def test_many_classes_are_named_at_their_centers_where_there_is_room():
    rng = np.random.default_rng(0)
    centers = np.stack(np.meshgrid(np.arange(6.0), np.arange(5.0)), -1).reshape(-1, 2)
    centers[29] = centers[0] + 0.01  # the rarest class is where the most frequent one is
    labels = np.repeat(np.arange(30), np.arange(40, 10, -1))
    xy = centers[labels] + 0.05 * rng.standard_normal((len(labels), 2))
    points = plot_embeddings.Points(xy, labels, np.zeros((0, 1, 1, 3), np.uint8))
    names = [f"class {i}" for i in range(30)]
    axis = plot_embeddings.draw(points, xy, names, thumbnails=False).axes[0]
    note, *texts = axis.texts
    assert [text.get_text() for text in texts] == names[:29]
    assert note.get_text().startswith("29 of 30 classes")
    for text, center in zip(texts, centers, strict=False):
        np.testing.assert_allclose(text.get_position(), center, atol=0.1)


def test_learners_and_datasets_without_text(runs, read):
    learner = read(runs["captioner"])
    source = opened(learner)[2]
    mute = learner._replace(config=toy.config("classifier"), tokenizer=tokenizers.NoText())
    for of in (plot_embeddings.of_captions, plot_embeddings.of_words):
        with pytest.raises(UserError, match="a classifier reads no text; use --what images"):
            of(mute, source, 9)
        with pytest.raises(UserError, match="pictures has no captions; use --what images"):
            of(learner, stubs.Pictures(captions=[[]], labels=[0]), 9)


def test_error_messages(runs, tmp_path, capsys):
    def error(*arguments, run=runs["captioner"], out="out.png"):
        assert plot(run, tmp_path / out, *arguments) == 2
        captured = capsys.readouterr()
        assert not captured.out and len(captured.err.splitlines()) <= 2
        return captured.err

    assert "must end in .png or .svg" in error(out="out.pdf")
    assert "is not the folder of a run" in error(run=tmp_path)
    assert "4 points are too few; use 5 or more" in error("--count", "4")
    assert "words have no images" in error("--what", "words", "--thumbnails")
    with pytest.raises(UserError, match="its embeddings are not finite"):
        places(np.full((9, 3), np.nan), "pca")
