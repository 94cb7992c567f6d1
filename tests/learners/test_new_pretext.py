"""One more pretext is one class and one line: here that of Doersch et al. 2015 (1505.05192).

Of a 3 x 3 grid of patches with gaps between them, the middle one and one of its neighbours go
through the same tower; which of the eight neighbours it is, is to be told.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain import learners, train
from cap_pretrain.checkpoints import warm_start
from cap_pretrain.errors import UserError
from cap_pretrain.learners import augment
from cap_pretrain.learners.classifier import classification
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.layers import constrain
from cap_pretrain.training import plan
from cap_pretrain.validation import validate
from tests import toy

NEIGHBOURS = 8


class RelativePosition(nnx.Module):
    """A tower for patches, and a linear layer on the vectors of two patches."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`: sides in pixels of a patch and of the gap."""

        patch: int = 96
        gap: int = 48

    RECIPES: ClassVar[dict[str, dict[str, Any]]] = {
        "reference": {"batch_size": 64, "total_epochs": 2.0, "data.image_size": 384},
        "small": {"learner.patch": 8, "learner.gap": 2, "data.image_size": 32},
    }

    reads = ("image",)

    def __init__(self, encoder, *, options: Options, rngs: nnx.Rngs):
        self.encoder, self.options = encoder, options
        self.head = nnx.Linear(2 * encoder.width, NEIGHBOURS, rngs=rngs)

    @classmethod
    def from_config(cls, config, vocab_size: int, rngs: nnx.Rngs) -> "RelativePosition":
        return cls(build_encoder(config, rngs), options=learners.options(config), rngs=rngs)

    def loss(self, batch, key, train: bool):
        of_labels, of_encoder = jax.random.split(key)
        images, side = batch["image"], self.options.patch
        draw = jax.vmap(lambda key: jax.random.randint(key, (), 0, NEIGHBOURS))
        labels = draw(augment.keys(of_labels, len(images)))

        def cut(image, label):
            cells = jnp.stack([4, label + (label >= 4)])
            starts = (side + self.options.gap) * jnp.stack(jnp.divmod(cells, 3), axis=1)
            patch = functools.partial(jax.lax.dynamic_slice, image, slice_sizes=(side, side, 3))
            return jax.vmap(lambda start: patch((*start, 0)))(starts)

        pairs = jax.vmap(cut)(augment.unit_range(images), labels)
        towers = constrain(pairs.reshape(-1, side, side, 3)) * 2 - 1
        found = self.encoder(towers, train=train, key=of_encoder).pooled.astype(jnp.float32)
        counts = batch.get("mask", jnp.ones(len(images), bool))
        logits = self.head(found.reshape(len(images), -1))
        loss, metrics = classification(logits, labels, counts)
        return loss, metrics | {"chance": jnp.float32(1 / NEIGHBOURS)}


@pytest.fixture(autouse=True)
def one_line(monkeypatch):
    line = f"{__name__}:{RelativePosition.__name__}"
    monkeypatch.setitem(learners.REGISTRY, "relative_position", line)


def small(**fields):
    c = toy.load("pretext", "task=relative_position,recipe=small")
    return toy.shrink(c, data__image_size=32, **fields)


def test_its_recipes_are_those_of_the_config_file():
    c = toy.load("pretext", "task=relative_position")
    assert (c.learner.patch, c.batch_size, c.data.image_size) == (96, 64, 384)
    c = small()
    assert c.learner.name == "relative_position" and c.learner.patch == 8
    validate(c)
    with pytest.raises(
        UserError, match="recipe='smal' is not a recipe of relative_position.*'small'"
    ):
        toy.load("pretext", "task=relative_position,recipe=smal")
    with pytest.raises(UserError, match="Did you mean 'relative_position'"):
        toy.load("pretext", "task=relativ_position")


def test_it_can_be_planned():
    counted = plan.flops_per_example(small(), 0)
    assert counted["training"] > 2 * counted["forward"] > 0


@pytest.mark.slow
def test_it_trains_is_evaluated_resumes_and_its_encoder_is_taken_over(tmp_path):
    c = small(checkpoint__every_steps=1, total_steps=2, eval__every_steps=1)
    train.run(c, tmp_path / "run")
    first, second = toy.losses(tmp_path / "run")
    assert np.isclose(first["train/chance"], 1 / 8) and 0 <= first["train/accuracy"] <= 1
    assert second["train/loss"] != first["train/loss"]
    assert any("loss/accuracy" in line for line in toy.lines(tmp_path / "run"))
    c = small(checkpoint__every_steps=1, total_steps=3, eval__every_steps=1)
    train.run(c, tmp_path / "run", allow_changes=("total_steps",))
    assert len(toy.losses(tmp_path / "run")) == 3

    probe = toy.config("encoder", encoder=str(tmp_path / "run"), total_steps=0)
    resolved, beginning = warm_start.resolve(probe)
    assert (resolved.model.name, resolved.data.image_size) == ("mu/8", 32)
    assert beginning.params and all(path.startswith("encoder/") for path in beginning.params)
