"""Images in their own aspect ratio on several devices: the same losses."""

import numpy as np
import pytest

from cap_pretrain import naflex
from cap_pretrain.data.views import prepared
from tests import toy
from tests.layouts import SMALL, Training, config, on_eight_devices
from tests.models.test_positions import MODERN


def oblong(c, number, words):
    """The batch of the square layout with images of other shapes."""
    batch, rng = toy.batch(c, number, words), np.random.default_rng(number)
    side = c.data.image_size
    shapes = rng.integers(side // 2, 2 * side, (c.batch_size, 2))
    pixels = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    return batch | {"image": np.stack([prepared(image, side, patch=8) for image in pixels])}


def losses_on(layout, attention, fields):
    c = config("cappa", **SMALL, data__image_size=32, accumulate=2, model__heads=8)
    c.model.update(fields)
    c.data.layout, c.model.attention = naflex.NAFLEX, attention
    training = Training(c, layout)
    return training.go_on(training.init(), 3, oblong)[1]


@pytest.mark.slow
def test_every_layout_and_form_of_attention_gives_the_same_losses():
    for fields in ({}, MODERN):
        layouts = [("one", "auto"), ("all", "auto"), ("data", "keep"), ("fsdp", "recompute")]
        one, *others = on_eight_devices(losses_on, [(*own, fields) for own in layouts])
        for losses in others:
            np.testing.assert_allclose(losses, one, rtol=1e-5)
