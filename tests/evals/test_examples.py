"""Examples for the report: attention over images, right and wrong ones, pretexts' pictures."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from cap_pretrain import evals, learners, reports, train
from cap_pretrain.evals import examples, exhibits
from cap_pretrain.evals.retrieved import Found
from cap_pretrain.learners import jigsaw
from tests import tiny, toy


def test_a_heat_map_lies_over_its_part_of_the_image():
    heat = np.zeros((4, 4), np.float32)
    heat[0, 3] = 1
    drawn = examples.heated(np.full((40, 60, 3), 128, np.uint8), heat)
    assert drawn.shape == (80, 120, 3)
    assert drawn[6, 114].sum() > 2 * drawn[66, 14].sum()


def test_right_and_wrong_examples_are_balanced():
    right = {k: k != 3 for k in range(20)}
    chosen = examples.balanced(right, 6)
    assert len(chosen) == 6 and 3 in chosen and chosen == sorted(chosen)
    assert examples.balanced({1: True, 2: False}, 6) == [1, 2]
    odd = {k: k % 2 == 1 for k in range(20)}
    assert examples.balanced(odd, 6) == [0, 1, 2, 3, 4, 5]


class Shapes:
    """Images of one color each, with two captions."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        image = np.full((8, 8, 3), 40 * index, np.uint8)
        return {"image": image, "captions": [f"{index} a", f"{index} b"], "id": f"id{index}"}


def test_retrieved_examples_are_the_best_of_the_score_matrix():
    owner = np.repeat(np.arange(5), 2)
    scores = np.random.default_rng(0).normal(size=(5, 10)).astype(np.float32)
    scores[2, 4] = 9.0  # the second image finds its first caption, and that its image
    found = Found(np.arange(10), None)
    found.add(np.arange(3), scores[:3])
    found.add(np.arange(3, 5), scores[3:])
    by_title = {shown.title: shown for shown in found.exhibits(Shapes(), owner)}
    own = by_title["captions of id2"]
    best = np.argsort(-scores[2])[:3]
    assert [line.text for line in own.lines[:3]] == [f"{k // 2} {'ab'[k % 2]}" for k in best]
    assert [line.right for line in own.lines[:3]] == [k // 2 == 2 for k in best]
    assert own.lines[0].right and own.panels[0].image[0, 0, 0] == 80
    image = by_title["images for caption 1 of id2"]
    assert image.panels[0].right and image.panels[0].image[0, 0, 0] == 80


def test_only_the_first_columns_of_the_score_matrix_are_kept():
    found = Found(np.arange(1000), None)
    scores = np.zeros((2, 1000), np.float32)
    alive = weakref.ref(scores)
    found.add(np.arange(2), scores)
    del scores
    assert alive() is None


def test_tiles_in_their_own_order_are_the_image():
    cells = jnp.arange(9, dtype=jnp.float32).reshape(1, 9, 1, 1, 1) / 9
    tiles = jnp.broadcast_to(cells, (1, 9, 4, 4, 3))
    joined = jigsaw._joined(tiles)
    assert joined.shape == (1, 3 * 4 + 2 * 2, 16, 3)[:1] + (16, 16, 3)
    assert joined[0, 0, 0, 0] == 0 and joined[0, 0, 6, 0] == 28 and joined[0, 6, 0, 0] == 85


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotation", "jigsaw", "colorization", "simclr"])
def test_pretexts_show_what_they_predict(name):
    options = {"jigsaw": dict(crop=12, cell=4, tile=4, permutations=5, hidden=(8,))}
    graphdef, *variables = tiny.split(tiny.config(name, options.get(name)))
    images = tiny.images(6)

    def show(learner, images):
        return learner.illustrate({"image": images}, jax.random.key(0))

    panels, right = tiny.jitted((graphdef, *variables), show)(images)
    names = learners.learner_class(name).panel_names()
    assert len(panels) == len(names)
    assert all(panel.dtype == np.uint8 and panel.shape[0] == 6 for panel in panels)
    if name == "rotation":
        back = (np.asarray(panels[1]) == images).all((1, 2, 3))
        np.testing.assert_array_equal(back, right)
    if name == "jigsaw":
        given, arranged = (np.asarray(panel) for panel in panels)
        np.testing.assert_array_equal(np.sort(given.ravel()), np.sort(arranged.ravel()))


@pytest.mark.slow
def test_runs_leave_a_report_with_examples(tmp_path, tokenizer_path):
    fields = dict(text__tokenizer=str(tokenizer_path), eval__every_steps=1)
    for name, kinds in (("captioner", ("loss", "captions", "knn")), ("dual_encoder", ("loss",))):
        c = toy.config(name, **fields)
        limits = {"knn": dict(train_limit=20, limit=10, k=3), "captions": dict(count=4)}
        made = {kind: evals.defaults(kind, **limits.get(kind, {})) for kind in kinds}
        c.evals = ConfigDict(made)
        workdir = tmp_path / name
        train.run(c, workdir)
        page = (workdir / reports.FILE).read_text()
        assert "finished at step 2 of 2" in page
        found = {kind: exhibits.path(workdir, kind) for kind in kinds}
        if name == "dual_encoder":
            titles = [e["title"] for e in exhibits.read(found["loss"])["exhibits"]]
            assert any(t.startswith("captions of") for t in titles)
            assert any(t.startswith("images for") for t in titles)
            continue
        captions = exhibits.read(found["captions"])["exhibits"]
        assert len(captions) == 4 and captions[0]["panels"][0]["width"] == 16
        words = captions[0]["lines"][0]["text"].split()
        assert len(captions[0]["panels"]) >= 1 + bool(words)
        assert len(exhibits.read(found["knn"])["exhibits"][0]["panels"]) == 5
