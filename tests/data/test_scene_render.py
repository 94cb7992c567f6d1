"""Rendered scenes show the objects, colors, patterns and noise of the scene."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from cap_pretrain.data.scenes.render import render
from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.scenes.world import PATTERNS, SHAPES, Scene


def test_the_same_scene_at_every_size():
    differences, unlike = [], []
    for i in range(20):
        scene, other = Scenes("train").scene(i), Scenes("train").scene(i + 1)
        small = render(scene, 48, 0.0).astype(float)
        large = render(scene, 192, 0.0).reshape(48, 4, 48, 4, 3).mean((1, 3))
        differences.append(np.abs(small - large).mean())
        unlike.append(np.abs(small - render(other, 48, 0.0)).mean())
    assert max(differences) < 2.0
    assert min(unlike) > 4.0


def test_pixels_show_the_colour_at_the_place():
    rgb = {"red": (215, 35, 40), "blue": (35, 80, 215), "yellow": (245, 222, 45)}
    source = Scenes("train", 96, noise=0.0, patterns=False)
    checked = 0
    for i in range(150):
        record = source[i]["image"]
        for t in source.scene(i).things:
            if t.colour in rgb and t.shape != "ring":
                pixel = record[int(t.y * 96), int(t.x * 96)].astype(int)
                assert np.abs(pixel - rgb[t.colour]).max() <= 14
                checked += 1
    assert checked > 50


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_anti_aliased_and_whole(shape):
    source = Scenes("train", noise=0.0, patterns=False, max_objects=1)
    k = next(i for i in range(500) if source.scene(i).things[0].shape == shape)
    thing = source.scene(k).things[0]
    cover = _cover(source.scene(k), 64)
    assert 10 < ((cover > 0.2) & (cover < 0.8)).sum() < (cover >= 0.8).sum()
    ys, xs = np.nonzero(cover > 0.5)
    # The shape is inside its circle and spans most of a diameter: not clipped, not tiny.
    assert np.hypot(xs + 0.5 - thing.x * 64, ys + 0.5 - thing.y * 64).max() < thing.radius * 64 + 1
    assert max(np.ptp(xs), np.ptp(ys)) > 1.6 * thing.radius * 64 - 2
    box = np.abs(np.stack([xs + 0.5 - thing.x * 64, ys + 0.5 - thing.y * 64])).max()
    assert box < thing.radius * 64


def _cover(scene: Scene, size: int) -> np.ndarray:
    """Return the coverage of each pixel [S, S] by the only object of a scene."""
    image = render(scene, size, 0.0).astype(float)
    ground = render(replace(scene, things=()), size, 0.0).astype(float)
    change = np.abs(image - ground).sum(-1)
    return change / np.quantile(change[change > 0], 0.8)


def test_patterns_and_noise_show():
    scene = Scenes("train", max_objects=1).scene(3)
    pictures = []
    for pattern in PATTERNS:
        marked = replace(scene, things=(replace(scene.things[0], pattern=pattern),), noise=1.0)
        pictures.append(render(marked, 64, 0.0).astype(float))
        grain = render(marked, 64, 0.05) - pictures[-1]
        assert 9 < grain.std() < 14  # 0.05 of 255 is 12.75, less where it is clipped
    for a, b in permutations(pictures, 2):
        assert (np.abs(a - b).max(-1) > 60).sum() > 10
