"""Features are exact, cached, and recomputed when anything that they depend on has changed."""

import jax
import numpy as np
import pytest

from cap_pretrain.data.sources import subset
from cap_pretrain.errors import UserError
from cap_pretrain.evals.probes.features import Features
from tests import tiny
from tests.evals.labelled import Coloured, context
from tests.evals.stubs import Pictures

SOURCE = Coloured(45, 3, broken=(7, 44))
WHOLE = [i for i in range(45) if i not in (7, 44)]


def features(made, layer="pooled", source=SOURCE, batch_size=8):
    return Features(made, source, layer=layer, batch_size=batch_size)


@pytest.fixture(scope="module")
def encoded():
    """A context, its variables, and the encoder's output for all images at once."""
    made, variables = context(SOURCE, SOURCE)
    images = np.stack([SOURCE[i]["image"] for i in WHOLE])

    def encode(learner, images):
        out = learner.encode(images)
        pixels = images / np.float32(127.5) - 1
        layers = {name: learner.encoder.tokens_at(name, pixels) for name in learner.encoder.layers}
        return out, layers

    return made, variables, tiny.jitted((made.graphdef, *variables), encode)(images)


@pytest.mark.parametrize("layer", ["pooled", "tokens", "block_2"])
def test_every_image_counts_once_in_order_and_broken_ones_not_at_all(encoded, layer):
    made, variables, (out, layers) = encoded
    found = features(made, layer)(variables)
    expected = {
        "pooled": out.pooled,
        "tokens": out.tokens.mean(1),
        "block_2": layers["block_2"].mean(1),
    }[layer]
    assert found.features.dtype == np.float32 and found.features.shape == (43, 16)
    np.testing.assert_allclose(found.features, expected, atol=1e-5)
    np.testing.assert_array_equal(found.labels, [SOURCE[i]["label"] for i in WHOLE])


def test_images_without_a_label_are_left_out(encoded):
    pictures = Pictures(labels=[1, -1, 0, 2])
    found = features(encoded[0], "pixels", pictures)(encoded[1])
    assert found.labels.tolist() == [1, 0, 2] and len(found.features) == 3


def test_the_batch_size_does_not_change_a_bit(encoded):
    made, variables, _ = encoded
    small, large = (features(made, batch_size=size)(variables) for size in (1, 64))
    assert small.features.tobytes() == large.features.tobytes()


def test_pixels_are_the_image_itself():
    c, variables = context(SOURCE, SOURCE)
    found = features(c, "pixels")(variables)
    expected = (
        np.stack([SOURCE[i]["image"] for i in WHOLE]) / 255
    )  # they have 16 x 16 pixels already
    np.testing.assert_allclose(found.features, expected.reshape(43, -1), atol=1e-6)


@pytest.fixture
def kept(tmp_path):
    """A context with a folder, its variables, and a list of the computations of features."""
    made, variables = context(SOURCE, SOURCE, workdir=tmp_path)
    computed = []

    def find(layer="pooled", source=SOURCE, variables=variables, made=made):
        maker = features(made, layer, source)
        compute = maker._compute
        maker._compute = lambda v: computed.append(layer) or compute(v)
        return maker(variables)

    return made, variables, find, computed, tmp_path


def test_they_are_computed_once_for_all_who_ask(kept):
    _, _, find, computed, folder = kept
    first, second = find(), find()
    assert computed == ["pooled"]
    assert [p.parent.name for p in folder.rglob("*.npz")] == ["features"]
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_any_change_of_what_they_depend_on_computes_them_anew(kept):
    _, (params, stats), find, computed, _ = kept
    find()
    changes = 1

    def is_new(**options):
        nonlocal changes
        changes += 1
        found = find(**options)
        assert len(computed) == changes
        return found

    is_new(layer="tokens")
    is_new(source=Coloured(45, 3, seed=1))
    is_new(source=Coloured(44, 3))
    is_new(source=subset.sample(SOURCE, 40, seed=0))
    is_new(source=subset.sample(SOURCE, 40, seed=1))
    before = find()
    assert len(computed) == changes
    nudged = jax.tree.map(lambda x: x, params)
    kernel = nudged["encoder"]["patch_embedding"]["kernel"]
    nudged["encoder"]["patch_embedding"]["kernel"] = kernel.at[0, 0].add(1e-3)
    after = is_new(variables=(nudged, stats))
    assert (before.features != after.features).any()
    # The rest of the learner does not matter, and pixels do not depend on the encoder.
    decoder = params | {"decoder": jax.tree.map(lambda p: p + 1, params["decoder"])}
    is_new(variables=(decoder, stats))  # replaces the features of the nudged weights
    find(variables=(params, stats))
    assert len(computed) == changes
    is_new(layer="pixels")
    find(layer="pixels", variables=(nudged, stats))
    assert len(computed) == changes


def test_another_architecture_with_the_same_weights_is_another_encoder(kept):
    made, _, find, computed, _ = kept
    find()
    c = tiny.config(activation="gelu")
    graphdef = tiny.abstract(c)[0]
    find(made=type(made)(**(vars(made) | {"graphdef": graphdef})))
    assert len(computed) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_computed_again(kept, damage):
    _, _, find, computed, folder = kept
    right = find()
    (path,) = folder.rglob("*.npz")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    new = {"cut": content[:-2000], "flipped": content, "empty": b"", "foreign": b"PK" + b"x" * 99}
    path.write_bytes(new[damage])
    assert find().features.tobytes() == right.features.tobytes()
    assert len(computed) == 2
    find()
    assert len(computed) == 2


def test_only_the_last_weights_stay_on_disk(kept):
    _, (params, stats), find, _, folder = kept
    find()
    find(variables=(jax.tree.map(lambda p: p * 1.1, params), stats))
    assert len([p for p in folder.rglob("*") if p.is_file()]) == 1


def test_what_cannot_be_is_told(encoded):
    made, (params, stats), _ = encoded
    with pytest.raises(UserError, match="no layer 'blok_2'. Did you mean 'block_2'"):
        features(made, "blok_2")((params, stats))
    with pytest.raises(UserError, match="has no labels"):
        features(made, source=Pictures(captions=[["a red ring"]]))
    with pytest.raises(UserError, match="has no image that can be decoded"):
        features(made, "pixels", Coloured(3, 3, broken=(0, 1, 2)))((params, stats))
    broken = jax.tree.map(lambda p: p * np.nan, params)
    with pytest.raises(UserError, match="are not finite"):
        features(made)((broken, stats))
