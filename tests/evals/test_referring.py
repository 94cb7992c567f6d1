"""Boxes for referring expressions: intersection over union, and the accuracy of a learner."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.evals.metrics.boxes import intersection_over_union
from cap_pretrain.evals.referring import Referring, drawn
from tests.evals import stubs


def by_counting(a, b, cells=40):
    """The intersection over union of boxes on a grid, by counting its cells."""
    inside = np.zeros((2, cells, cells), bool)
    for mask, (left, top, right, bottom) in zip(inside, np.multiply((a, b), cells), strict=True):
        mask[int(top) : int(bottom), int(left) : int(right)] = True
    union = inside.any(0).sum()
    return inside.all(0).sum() / union if union else 0.0


def test_intersection_over_union_is_that_of_counted_cells():
    rng = np.random.default_rng(0)
    a, b = (np.sort(rng.integers(0, 41, (300, 2, 2)), axis=1).reshape(-1, 4) / 40 for _ in "ab")
    found = intersection_over_union(a, b)
    np.testing.assert_allclose(
        found, [by_counting(*pair) for pair in zip(a, b, strict=True)], atol=1e-6
    )
    assert (found > 0.3).any() and (found == 0).any()
    assert intersection_over_union(a[:, None], b).shape == (300, 300)
    assert np.array_equal(intersection_over_union(a[5], a[5]), 1.0)
    upside_down = np.array([0.5, 0.5, 0.1, 0.1])
    assert intersection_over_union(upside_down, upside_down) == 0


class Pointer(nnx.Module):
    """Finds a box of the image's gray level g and the first number n: (g / 20, 0, 1, n / 20)."""

    def locate(self, images, text):
        gray = images[:, 0, 0, 0] / 20
        return jnp.stack([gray, 0 * gray, 0 * gray + 1, (text[:, 0] - 2) / 20], axis=1)


class Blind(nnx.Module):
    """Finds no boxes."""


class Places(stubs.Pictures):
    """Gray images with up to two regions, which numbers refer to."""

    def __init__(self):
        rng = np.random.default_rng(1)
        super().__init__([[]] * 12, broken={4})
        corners = np.sort(rng.random((12, 2, 2, 2)), axis=2).reshape(12, 2, 4)
        self.own = [
            [(f"{n + i % 9} 3", tuple(corners[i, n].tolist())) for n in range(i % 3)]
            for i in range(12)
        ]

    def __getitem__(self, index):
        return super().__getitem__(index) | {"regions": self.own[index]}


@pytest.mark.parametrize("limit", [0, 7])
def test_accuracy_is_that_of_every_expression_of_readable_images(limit):
    source = Places()
    context, variables = stubs.context(Pointer, source)
    options = Referring.Options(batch_size=4, limit=limit, samples=4, threshold=0.1)
    result = Referring(context, options)(variables)
    boxes, found = [], []
    for i in set(range(limit or 12)) - {4}:
        for phrase, box in source.own[i]:
            boxes.append(box)
            found.append((i / 20, 0, 1, int(phrase.split()[0]) / 20))
    overlaps = [float(intersection_over_union(*pair)) for pair in zip(found, boxes, strict=True)]
    constant = intersection_over_union(np.mean(boxes, axis=0), np.array(boxes))
    assert result.metrics == pytest.approx(
        {
            "accuracy": np.mean(np.array(overlaps) >= 0.1),
            "mean_iou": np.mean(overlaps),
            "constant_accuracy": np.mean(constant >= 0.1),
        }
    )
    assert limit or 0 < result.metrics["accuracy"] < 1
    assert result.details["expressions"] == len(boxes)
    assert [one["iou"] for one in result.details["samples"]] == pytest.approx(overlaps[:4])


def test_boxes_are_drawn_where_they_are():
    image = np.zeros((40, 80, 3), np.uint8)
    shown = drawn(image, (0.25, 0.5, 0.75, 1.0), (9, 8, 7))
    rows, columns = np.nonzero(shown[..., 0] == 9)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (20, 39, 20, 59)
    assert not image.any() and not shown[25, 40].any()


@pytest.mark.parametrize(
    ("learner", "source", "options", "message"),
    [
        (Blind, Places(), {}, "a Blind does not find"),
        (Pointer, stubs.Pictures([[]]), {}, "has none"),
        (Pointer, Places(), {"threshold": 0.0}, "threshold: 0.0"),
    ],
)
def test_mistakes_are_found_before_the_run(learner, source, options, message):
    context, _ = stubs.context(learner, source)
    with pytest.raises(UserError, match=message):
        Referring(context, Referring.Options(**options))


def test_boxes_that_are_not_trained_are_not_decoded():
    context, _ = stubs.context(Pointer, Places())
    section = learners.defaults("locca", aref_weight=0.0)
    context = dataclasses.replace(context, config=learners.with_learner(context.config, section))
    with pytest.raises(UserError, match=r"learner\.aref_weight: 0; set it"):
        Referring(context, Referring.Options())
