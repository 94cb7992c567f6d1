"""Tests of configs/pretext.py on a ResNet: tasks train, are evaluated and resume exactly."""

import shutil

import jax
import numpy as np
import pytest

from cap_pretrain import learners, train
from cap_pretrain.errors import UserError
from cap_pretrain.validation import validate
from tests import toy

TASKS = ("rotation", "jigsaw", "colorization", "simclr")
# Options for images of 32 pixels.
SMALL = {
    "jigsaw": dict(crop=30, cell=10, tile=8, shift=1, permutations=10, hidden=(16,), tower=0),
}


def small(task):
    """Return a task's reference recipe with a narrow ResNet-18 and few small images."""
    c = toy.load("pretext", f"task={task},encoder=resnet18")
    c = toy.shrink(c, model__name="resnet18", model__width=8, data__image_size=32)
    c.total_epochs, c.total_steps = 0.0, 4
    for name, value in SMALL.get(task, {}).items():
        c.learner[name] = value
    c.checkpoint.every_steps = 2
    c.evals.loss.limit = c.evals.loss.batch_size = 8
    return c


def test_tasks_and_their_recipes():
    assert tuple(learners.pretexts()) == TASKS
    message = "recipe='elhagri' is not a recipe of rotation: .* mean 'elhagry'"
    with pytest.raises(UserError, match=message):
        toy.load("pretext", "task=rotation,recipe=elhagri")
    c = toy.load("pretext", "task=simclr,encoder=vit,data=data/coco,evals=loss+knn")
    assert (c.model.name, c.data.name, sorted(c.evals)) == ("S/16", "data/coco", ["knn", "loss"])


@pytest.mark.parametrize("task", TASKS)
def test_stored_features_are_rejected(task):
    c = toy.load("pretext", f"task={task},encoder=stored")
    with pytest.raises(UserError, match=f"{task} learns from images, not from stored features"):
        learners.build(c, 0, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_resumes_bit_for_bit_with_batch_statistics(task, tmp_path):
    c = small(task)
    validate(c)
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    train.run(c, whole)
    # The files of a run that was killed after its second step.
    shutil.copytree(whole, halved)
    shutil.rmtree(halved / "checkpoints" / "4")
    train.run(c, halved)
    ends = [toy.saved_state(c, workdir, 0, 4) for workdir in (whole, halved)]
    toy.assert_same(*ends)
    middle = toy.saved_state(c, whole, 0, 2)
    moved = middle.stats["encoder"]["stem"]["norm"]["mean"]
    assert not np.array_equal(moved, ends[0].stats["encoder"]["stem"]["norm"]["mean"])
    metrics = next(line for line in toy.lines(whole) if "loss/chance" in line)
    assert np.isfinite(metrics["loss/loss"]) and 0 < metrics["loss/chance"] < 1
