"""Colors: conversions against scikit-image, bins, and the round trip of a color."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.models import lab
from tests import parity

SOME = np.concatenate(
    [np.indices((2, 2, 2)).reshape(3, -1).T, np.random.default_rng(0).random((500, 3))]
)


def faces(levels):
    """Return the surface of the RGB cube [..., 3], sampled at these levels."""
    free = np.stack(np.meshgrid(levels, levels), axis=-1).reshape(-1, 2)
    return np.concatenate([np.insert(free, k, v, axis=1) for k in range(3) for v in (0.0, 1.0)])


@pytest.mark.parity
def test_lab_is_that_of_scikit_image():
    color = parity.require("skimage.color")
    expected = color.rgb2lab(SOME)
    found = jax.jit(lab.lab)(jnp.asarray(SOME, jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=5e-4)
    np.testing.assert_allclose(lab.lab(SOME), expected, atol=5e-4)
    any_lab = np.random.default_rng(1).uniform((0, -60, -60), (100, 60, 60), (500, 3))
    back = jax.jit(lab.rgb)(jnp.asarray(any_lab, jnp.float32))
    inside = np.all((back > 0) & (back < 1), axis=-1)  # scikit-image clips other colors differently
    assert 100 < inside.sum() < 400
    np.testing.assert_allclose(back[inside], color.lab2rgb(any_lab)[inside], atol=2e-5)


def test_lab_of_known_colours():
    # Lindbloom's calculator, D65: sRGB red, green, blue, and a gray of 18%.
    known = {(1, 0, 0): (53.24, 80.09, 67.20), (0, 1, 0): (87.73, -86.18, 83.18)}
    known |= {(0, 0, 1): (32.30, 79.19, -107.86), (1, 1, 1): (100, 0, 0), (0, 0, 0): (0, 0, 0)}
    found = lab.lab(np.array(list(known), np.float64))
    np.testing.assert_allclose(found, list(known.values()), atol=0.02)


def test_a_colour_comes_back_from_lab():
    pixels = jnp.asarray(SOME, jnp.float32)
    back = jax.jit(lambda pixels: lab.rgb(lab.lab(pixels)))(pixels)
    np.testing.assert_allclose(back, pixels, atol=2e-5)


def test_gray_has_the_lightness_and_no_colour():
    pixels = jnp.asarray(SOME, jnp.float32)
    gray = jax.jit(lab.gray)(pixels)
    assert gray.shape == pixels.shape and (np.ptp(gray, axis=-1) == 0).all()
    gray = np.asarray(gray, np.float64)
    found = lab.lab(gray)
    np.testing.assert_allclose(found[:, 0], lab.lab(SOME)[:, 0], atol=1e-3)
    np.testing.assert_allclose(found[:, 1:], 0, atol=0.01)
    np.testing.assert_allclose(lab.gray(gray), gray, atol=1e-6)


def test_bins_are_where_colours_are():
    bins = lab.bins()
    assert bins.shape == (lab.BINS, 2) and lab.BINS == 261
    assert (bins % lab.STEP == 0).all() and len(np.unique(bins, axis=0)) == len(bins)
    # Colors inside the cube have the same bins as those of its faces.
    cube = np.stack(np.meshgrid(*[np.linspace(0, 1, 24)] * 3), axis=-1).reshape(-1, 3)
    ab = lab.lab(cube)[:, 1:]
    assert np.abs(bins[lab.nearest_bin(ab)] - ab).max() <= lab.STEP / 2


@pytest.mark.slow
def test_more_levels_have_no_more_bins():
    cells = np.round(lab.lab(faces(np.arange(256) / 255))[:, 1:] / lab.STEP)
    assert {*map(tuple, cells)} == {*map(tuple, lab.bins() / lab.STEP)}


def test_a_colour_is_shared_out_by_a_gaussian():
    ab = jnp.array([[0.0, 0.0], [4.0, -13.0]])
    numbers, shares = jax.jit(lab.encode)(ab)
    assert numbers.shape == shares.shape == (2, 10)
    np.testing.assert_allclose(np.sum(shares, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(numbers[:, 0], lab.nearest_bin(ab))
    for point, number, share in zip(ab, numbers, shares, strict=True):
        distance = np.linalg.norm(lab.bins() - point, axis=1)
        assert set(distance[number]) <= set(np.sort(distance)[:10])
        expected = np.exp(-(distance[number] ** 2) / 50)
        np.testing.assert_allclose(share, expected / expected.sum(), rtol=1e-4)


def test_annealed_mean():
    logits = np.random.default_rng(0).standard_normal((3, lab.BINS))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    sharp = np.exp(np.log(shares) / 0.38)  # equation 5 of the paper
    expected = sharp / sharp.sum(1, keepdims=True) @ lab.bins()
    logits[2] = 50 * np.eye(lab.BINS)[7]
    expected[2] = lab.bins()[7]
    found = jax.jit(lab.annealed_mean)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_what_comes_back_of_a_colour():
    ab = jnp.asarray(lab.lab(faces(np.linspace(0, 1, 40)))[:, 1:], jnp.float32)

    @jax.jit
    def errors(ab):
        numbers, shares = lab.encode(ab)
        rows = jnp.arange(len(ab))[:, None]
        logits = jnp.log(jnp.zeros((len(ab), lab.BINS)).at[rows, numbers].set(shares))
        back = [lab.annealed_mean(logits, t) for t in (1.0, lab.TEMPERATURE)]
        return jnp.linalg.norm(jnp.stack(back) - ab, axis=-1)

    of_mean, annealed = np.asarray(errors(ab))
    # The mean is biased where there are no bins on the other side.
    assert of_mean.mean() < 0.6 and of_mean.max() < 5
    # The annealed mean is drawn towards the nearest bin, which is off by up to 7.07.
    assert annealed.mean() < 2.2 and annealed.max() < 5


def test_rare_colours_count_more_and_the_mean_is_one():
    counts = np.zeros(lab.BINS)
    gray = int(lab.nearest_bin(np.zeros(2)))
    counts[gray], counts[0] = 990, 10
    weights = lab.weights(counts)
    assert weights.dtype == np.float32 and weights[gray] == weights.min()
    kernel = np.exp(-((lab.bins()[:, None] - lab.bins()) ** 2).sum(-1) / 50)
    p = counts / 1000 @ (kernel / kernel.sum(1, keepdims=True))
    expected = 1 / (0.5 * p + 0.5 / lab.BINS)
    np.testing.assert_allclose(weights, expected / (p * expected).sum(), rtol=1e-5)
    assert (p * weights).sum() == pytest.approx(1)
    # The weight of a color that never occurs is limited by the uniform part.
    assert weights.max() / weights[gray] == pytest.approx(1 + lab.BINS * p[gray], rel=1e-4)
    np.testing.assert_allclose(lab.weights(counts, uniform=1.0), 1, rtol=1e-6)


def test_area_means():
    np.testing.assert_array_equal(lab.area_means(4, 2), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    np.testing.assert_allclose(lab.area_means(3, 2), [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]])
    np.testing.assert_allclose(lab.area_means(2, 4), [[1, 0], [1, 0], [0, 1], [0, 1]])
    np.testing.assert_allclose(lab.area_means(176, 13).sum(1), 1, rtol=1e-6)
