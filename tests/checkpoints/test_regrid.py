"""A checkpoint of another image size: what belongs to position embeddings is resampled."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cap_pretrain import train
from cap_pretrain.checkpoints import regrid
from cap_pretrain.checkpoints.manifest import describe
from cap_pretrain.errors import UserError
from cap_pretrain.optim import optimizers
from tests import toy


def state_of(tx, shape):
    """Random items of a state whose only parameters are position embeddings; moments are >= 0."""
    rng = np.random.default_rng(0)
    params = {"encoder": {"positions": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    opt_state = jax.eval_shape(tx.init, params)
    learner = {"params": params, "ema": params, "step": jax.ShapeDtypeStruct((), jnp.int32)}
    return jax.tree.map(
        lambda leaf: (10 * rng.random(leaf.shape)).astype(leaf.dtype),
        {"learner": learner, "optimizer": {"opt_state": opt_state}},
    )


def bilinear(x, new):
    """Upsample [h * h, D] to [new * new, D], without JAX."""
    side = round(len(x) ** 0.5)
    at = np.clip((np.arange(new) + 0.5) * side / new - 0.5, 0, side - 1)
    low = np.minimum(at.astype(int), max(side - 2, 0))
    weights = np.zeros((new, side))
    weights[np.arange(new), low] += 1 - (at - low)
    weights[np.arange(new), np.minimum(low + 1, side - 1)] += at - low
    both = np.einsum("ia,jb,abd->ijd", weights, weights, np.asarray(x).reshape(side, side, -1))
    return both.reshape(new * new, -1)


def moments(items):
    """The second moment [patches, width] that the optimizer's update divides by."""
    ((row, col, dense),) = [
        tuple(part["encoder"]["positions"] for part in (leaf.v_row, leaf.v_col, leaf.v))
        for leaf in jax.tree.leaves(
            items["optimizer"], is_leaf=lambda x: isinstance(x, optax.FactoredState)
        )
        if isinstance(leaf, optax.FactoredState) and jax.tree.leaves(leaf.v)
    ]
    if dense.shape != (1,):
        return np.asarray(dense)
    size = len(items["learner"]["params"]["encoder"]["positions"])
    patches = row if len(row) == size else col
    width = col if len(row) == size else row
    return np.outer(patches, width) / np.mean(row)


# Adafactor factors the moment where both sides have 32 elements, and by the larger one.
@pytest.mark.parametrize(
    ("name", "width", "old", "new"),
    [
        ("adamw", 8, 2, 3),
        ("adafactor", 48, 4, 6),  # not factored, then factored
        ("adafactor", 48, 6, 8),  # the larger side is another one afterwards
        ("adafactor", 64, 6, 8),  # equal sides
    ],
)
def test_everything_of_the_embeddings_is_resampled(name, width, old, new):
    c = toy.config(optim__name=name).optim
    abstract = {"encoder": {"positions": jax.ShapeDtypeStruct((old**2, width), jnp.float32)}}
    tx = optimizers.build(c, abstract, lambda _: 0.1)
    saved, fresh = state_of(tx, (old**2, width)), state_of(tx, (new**2, width))
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), fresh)
    found = regrid.grids(describe(saved), describe(target))
    assert found.sides == (old, new) and regrid.grids(describe(target), describe(target)) is None
    made = regrid.resampled(saved, target, found)
    assert describe(made) == describe(target)
    for part in ("params", "ema"):
        before, after = (items["learner"][part]["encoder"]["positions"] for items in (saved, made))
        np.testing.assert_allclose(after, bilinear(before, new), atol=1e-5)
    assert made["learner"]["step"] == saved["learner"]["step"]
    if name == "adafactor":
        dense = bilinear(moments(saved), new)
        if new**2 >= 32:  # what a factored moment can hold of it
            dense = np.outer(dense.mean(1), dense.mean(0)) / dense.mean()
        np.testing.assert_allclose(moments(made), dense, rtol=1e-4)
    else:
        pairs = zip(*(jax.tree.leaves(items["optimizer"]) for items in (saved, made)), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(b, bilinear(a, new) if a.ndim else a, atol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_with_images_of_another_size(tmp_path, capsys):
    common = dict(model__depth=1, optim__ema=0.9)
    c = toy.config("rotation", **common, total_steps=2)
    train.run(c, tmp_path)
    c = toy.config("rotation", **common, total_steps=4, data__image_size=40)
    with pytest.raises(UserError, match=r"data.image_size was 16, is now 40"):
        train.run(c, tmp_path, ["total_steps"])
    train.run(c, tmp_path, ["total_steps", "data.image_size"])
    said = capsys.readouterr().out
    assert "of 2 x 2 patches, are resampled to 5 x 5" in said and "Resuming from step 2." in said
    assert [line["step"] for line in toy.losses(tmp_path)] == [1, 2, 3, 4]
    state = toy.saved_state(c, tmp_path, 0, 4)
    assert state.params["encoder"]["positions"].shape == (25, 64)
    train.run(c, tmp_path)  # the config is that of the run now
    assert "Already at step 4 of 4" in capsys.readouterr().out
