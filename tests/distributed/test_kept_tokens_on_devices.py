"""`model.keep_tokens` on several devices: the same draws and losses, and no tokens are sent."""

import numpy as np
import pytest

from tests.collectives import Sent, of_step
from tests.layouts import SMALL, Training, config, on_eight_devices

FIELDS = {"data__image_size": 32, "model__keep_tokens": 0.5}
PLACES = ("encoder", "decoder")


def losses_on(layout, place):
    fields = SMALL | FIELDS | {"accumulate": 2, "model__heads": 8}
    c = config("cappa", **fields, model__keep_tokens_at=place)
    training = Training(c, layout)
    return training.go_on(training.init(), 3)[1]


@pytest.mark.slow
def test_every_layout_draws_the_same_tokens():
    calls = [(layout, place) for place in PLACES for layout in ("one", "all")]
    found = on_eight_devices(losses_on, calls)
    for one, several in (found[:2], found[2:]):
        np.testing.assert_allclose(several, one, rtol=1e-5)
    assert found[0] != found[2]


@pytest.mark.slow
def test_drawing_and_taking_tokens_sends_nothing():
    fields = {"accumulate": 1} | FIELDS
    calls = [("cap", "data", fields | {"model__keep_tokens_at": place}) for place in PLACES]
    for step in on_eight_devices(of_step, calls):
        assert not Sent(*step).shapes("all-gather", "all-to-all", "collective-permute")
        assert [2, 8, 32] in step[1]  # the kept tokens of a device's examples
