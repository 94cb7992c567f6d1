"""How datasets in TFDS format store regions: as the features "phrases" and "boxes"."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from cap_pretrain.data.regions import Region


def region_features() -> dict[str, Any]:
    """Return the TFDS features; the boxes are four numbers for each phrase."""
    return {
        "phrases": tfds.features.Sequence(tfds.features.Text()),
        "boxes": tfds.features.Sequence(np.float32),
    }


def stored_regions(regions: Sequence[Region]) -> dict[str, Any]:
    """Return the values of the features, JSON-serializable."""
    return {
        "phrases": [phrase for phrase, _ in regions],
        "boxes": [side for _, box in regions for side in box],
    }
