"""Fixtures of the tests of tools."""

import numpy as np
import pytest
from PIL import Image

from tests.tools.launchers import Bench


@pytest.fixture
def photo(tmp_path):
    """Return the path of an image file of noise, 30 x 20 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    path = tmp_path / "a_photo_with_a_long_name.png"
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def bench(tmp_path):
    """Return fakes of the programs of the clouds."""
    return Bench(tmp_path)
