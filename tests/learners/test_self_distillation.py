"""Self-distillation and masked patches: losses against torch, and how a teacher follows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain import learners, train
from cap_pretrain.errors import UserError
from cap_pretrain.learners import objectives, teacher
from cap_pretrain.training import plan, step, watch
from cap_pretrain.validation import validate
from tests import tiny, toy
from tests.layouts import SMALL, Training, bytes_per_device, on_eight_devices
from tests.test_train import sigterm_in, vocab_size

SIZES = dict(prototypes=12, hidden=16, bottleneck=8)
PATCHES = (tiny.SIDE // tiny.PATCH) ** 2
BATCH = {"image": tiny.images(4), "mask": np.array([1, 1, 0, 1], bool)}
KEY = jax.random.key(1)
in_parts = jax.jit(step.accumulated_gradients, static_argnums=(0, 5))


def made(name, **options):
    """A learner with random parameters and another random teacher, which has begun."""
    split = tiny.split(tiny.config(name, SIZES | options))
    split[2]["teacher"]["begun"] = jnp.float32(1)
    return split


def assert_loss(found, targets, losses):
    """Compare with NumPy: `losses` [4] of the examples, the teacher's distributions [4, ..., K]."""
    loss, metrics = found
    counted = BATCH["mask"]
    assert losses.std() > 1e-2
    np.testing.assert_allclose(loss, losses[counted].mean(), rtol=1e-4)
    entropy = -(targets * np.log(np.maximum(targets, 1e-30))).sum(-1).reshape(4, -1).mean(1)
    np.testing.assert_allclose(metrics["entropy"], entropy[counted].mean(), rtol=1e-3, atol=1e-5)
    assert metrics["loss_weight"] == 3


def in_evaluation(split):
    return tiny.jitted(split, lambda learner: learner.loss(BATCH, KEY, False))()


@pytest.mark.slow
@pytest.mark.parity
def test_crops_predict_the_whole_image_as_in_torch(monkeypatch):
    from tests import torch_reference

    crops = tiny.images(8, seed=1)
    pixels = crops / np.float32(127.5) - 1
    cls = learners.learner_class("distillation")
    monkeypatch.setattr(cls, "crops", lambda *_: jnp.asarray(pixels))
    split = made("distillation", crops=2, teacher_temperature=0.2)
    params, taught = split[1], split[2]["teacher"]
    _, whole = torch_reference.vit(taught["encoder"], BATCH["image"], tiny.HEADS)
    _, parts = torch_reference.vit(params["encoder"], crops, tiny.HEADS)
    wanted = torch_reference.prototypes(taught["head"], whole) - torch_reference.tensor(
        taught["center"]
    )
    targets = (wanted / 0.2).softmax(-1)
    logs = (torch_reference.prototypes(params["head"], parts) / 0.1).log_softmax(-1)
    losses = -(targets[:, None] * logs.reshape(4, 2, -1)).sum(-1).mean(1)
    assert_loss(in_evaluation(split), targets.numpy(), losses.numpy())


@pytest.mark.slow
@pytest.mark.parity
def test_hidden_patches_are_predicted_as_in_torch(monkeypatch):
    from tests import torch_reference

    drawn = np.array([[0, 3, 5], [1, 2, 15], [4, 8, 9], [7, 13, 14]])
    hidden = (drawn[..., None] == np.arange(PATCHES)).any(1)
    cls = learners.learner_class("masked_patches")
    monkeypatch.setattr(cls, "hidden", lambda *_: jnp.asarray(drawn))
    split = made("masked_patches", teacher_temperature=0.2)
    params, taught = split[1], split[2]["teacher"]
    images = BATCH["image"]
    whole, _ = torch_reference.vit(taught["encoder"], images, tiny.HEADS)
    masks = hidden, params["mask_token"]
    seen, _ = torch_reference.vit(params["encoder"], images, tiny.HEADS, hidden=masks)
    wanted = torch_reference.prototypes(taught["head"], whole) - torch_reference.tensor(
        taught["center"]
    )
    targets = (wanted / 0.2).softmax(-1)
    logs = (torch_reference.prototypes(params["head"], seen) / 0.1).log_softmax(-1)
    losses = -(targets * logs).sum(-1)[torch_reference.tensor(hidden)].reshape(4, 3)
    targets = targets[torch_reference.tensor(hidden)].reshape(4, 3, -1)
    assert_loss(in_evaluation(split), targets.numpy(), losses.mean(1).numpy())


@pytest.mark.slow
def test_a_teacher_follows_once_a_step_also_with_accumulation():
    """It begins as a copy of the student, whatever its first weights are."""
    graphdef, params, stats = made("masked_patches", momentum=0.75)
    stats["teacher"]["begun"] = jnp.float32(0)
    expected = None
    for number in range(3):
        now = jax.tree.map(lambda p, n=number: p * (1 + n), params)
        expected = now if expected is None else jax.tree.map(ema, expected, now)
        grads, _, stats = in_parts(graphdef, now, stats, BATCH, KEY, 2)
        assert stats["teacher"]["begun"] == 1
        for part in ("encoder", "head"):
            of_part = expected[part], stats["teacher"][part]
            for a, b in zip(*map(jax.tree.leaves, of_part), strict=True):
                np.testing.assert_allclose(b, a, atol=1e-5)
    largest = [float(np.abs(g).max()) for g in jax.tree.leaves(grads["encoder"]["blocks"])]
    assert np.isfinite(largest).all() and max(largest) > 1e-4


def ema(old, new):
    return 0.75 * old + 0.25 * new


@pytest.mark.slow
def test_the_center_is_the_running_mean_of_examples_that_count():
    options = teacher.Options(**SIZES)
    encoder = nnx.Linear(3, 5, rngs=nnx.Rngs(0))  # not used here
    head = teacher.Head(5, options=options, dtype=jnp.float32, rngs=nnx.Rngs(1))
    own = teacher.Teacher(encoder, head, options)
    features = np.random.default_rng(0).standard_normal((4, 2, 5)).astype(np.float32)
    cosines = np.asarray(own.head(features))
    for trains, center in ((True, 0.1 * cosines[[0, 1, 3]].mean((0, 1))), (False, None)):
        before = np.asarray(own.center[...])
        targets = own.targets(features, BATCH["mask"].astype(np.float32), train=trains)
        np.testing.assert_allclose(targets, jax.nn.softmax((cosines - before) / 0.04), rtol=1e-4)
        np.testing.assert_allclose(own.center[...], before if center is None else center, rtol=1e-4)


@pytest.mark.slow
def test_no_gradient_comes_through_the_teacher():
    """A teacher that just became the student gives the gradient of one that always was the same."""
    gradients = []
    for momentum in (0.0, 1.0):
        graphdef, params, stats = made("masked_patches", momentum=momentum)
        if momentum:
            stats["teacher"] |= {part: params[part] for part in ("encoder", "head")}
        gradients.append(in_parts(graphdef, params, stats, BATCH, KEY, 1)[0])
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.slow
def test_crops_are_small_parts_of_their_own_image():
    """Of images of one color each, all crops have the color of their image."""
    images = np.broadcast_to(
        np.arange(0, 200, 50, dtype=np.uint8)[:, None, None, None], (4, 16, 16, 3)
    )
    split = made("distillation", crops=3)
    crops = tiny.jitted(split, lambda learner, images: learner.crops(images, KEY))(images)
    assert crops.shape == (12, 8, 8, 3)
    expected = images[:, 0, 0, 0].repeat(3) / 127.5 - 1
    np.testing.assert_allclose(
        crops, np.broadcast_to(expected[:, None, None, None], crops.shape), atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("distillation", {"size": 6}, "learner.size: 6 is not a multiple of the patch size 4"),
        ("distillation", {"crops": 0}, "learner.crops: 0 must be at least 1"),
        ("distillation", {"momentum": 1.5}, "learner.momentum: 1.5 is not in"),
        ("distillation", {"area_min": 0.5}, "learner.area_min: 0.5 and area_max 0.4 must be"),
        ("masked_patches", {"share": 0.0}, "learner.share: 0.0 is not in"),
        ("masked_patches", {"model": "resnet18"}, "model.name: masked_patches needs a ViT"),
    ],
)
def test_settings_that_cannot_work_are_refused(name, options, message):
    def build(model=f"mu/{tiny.PATCH}", **options):
        c = tiny.config(name, options)
        c.model.name = model
        tiny.abstract(c)

    with pytest.raises(UserError, match=message):
        build(**options)


def resumed(name, options, folder):
    """Train on one device and on eight, resume each on the other; return losses and bytes."""
    c = toy.config(name, SIZES | {"prototypes": 16} | options, **SMALL, accumulate=2, batch_size=16)
    one, eight = Training(c, "one"), Training(c, "fsdp")
    curves = []
    for first, second in ((one, one), (eight, one), (one, eight)):
        state, before = first.go_on(first.init(), 2)
        workdir = f"{folder}/{len(curves)}"
        first.save(state, workdir)
        state, after = second.go_on(second.restored(workdir, 2), 2)
        curves.append(before + after)
        if first is second:
            exact = one.go_on(one.go_on(one.init(), 2)[0], 2)[0]
            toy.assert_same(jax.device_get(exact), jax.device_get(state))
    held = [
        [bytes_per_device(getattr(training.init(), part)) for part in ("params", "stats")]
        for training in (one, eight)
    ]
    return curves, held


@pytest.mark.slow
def test_a_teacher_is_saved_and_sharded_like_its_student(tmp_path):
    call = ("masked_patches", {}, str(tmp_path))
    ((curves, (one, eight)),) = on_eight_devices(resumed, [call])
    np.testing.assert_allclose(curves[1:], np.broadcast_to(curves[0], (2, 4)), rtol=1e-3)
    np.testing.assert_allclose(8 * np.array(eight) / one, 1, rtol=0.05)


@pytest.mark.slow
def test_in_a_joint_run_teachers_begin_late_and_go_on_exactly(
    tokenizer_path, tmp_path, monkeypatch
):
    """Of four steps, the first two are of captions alone; the run is stopped in the third."""
    c = toy.config(total_steps=4, text__tokenizer=str(tokenizer_path), **SMALL)
    c.learner = objectives.section("cap+distill+masked")
    for part, weight in (("distill", "0@0.5,1@0.75"), ("masked", "0@0.5,0.25@0.75")):
        c.learner.parts[part].update(SIZES)
        c.learner.weights[part] = weight
    c.learner.parts.distill.update(crops=2)
    c.checkpoint.every_steps = 2
    validate(c)
    train.dry_run(c, tmp_path / "plan")
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train.run(c, straight)
    with monkeypatch.context() as patch:
        sigterm_in(3, patch)
        with pytest.raises(watch.Stopped):
            train.run(c, stopped)
    train.run(c, stopped)
    assert toy.losses(stopped) == toy.losses(straight)
    vocab = vocab_size(straight)
    before, after = (toy.saved_state(c, straight, vocab, at) for at in (2, 4))
    toy.assert_same(after, toy.saved_state(c, stopped, vocab, 4))
    for part in ("distill", "masked"):
        assert before.stats["parts"][part]["teacher"]["begun"] == 0
        assert after.stats["parts"][part]["teacher"]["begun"] == 1
    first, last = toy.losses(straight)[1], toy.losses(straight)[3]
    assert "train/distill/loss" not in first and last["train/distill/loss"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distillation", "masked_patches"])
def test_passes_of_teacher_and_student_count_as_flops(name):
    """The teacher has a forward pass only; half of the patches are hidden, and crops have four."""
    c = tiny.config(name, SIZES)
    counted = plan.flops_per_example(c, 0)
    width, mlp, pixels = 16, 40, 3 * tiny.PATCH**2
    layer = 4 * width * width + 2 * width * mlp

    def encoder(n):
        return n * pixels * width + 3 * (n * layer + 2 * n * n * width)

    head = 16 * 16 + 16 * 16 + 16 * 8 + 8 * 12
    resized = 3 * 8 * tiny.SIDE * (tiny.SIDE + 8)  # one axis after the other
    seen = {
        "distillation": (encoder(PATCHES) + head + 8 * resized, 8 * (encoder(4) + head)),
        "masked_patches": (encoder(PATCHES) + PATCHES // 2 * head,) * 2,
    }
    teachers, students = seen[name]
    assert counted["forward"] == pytest.approx(2 * (teachers + students), rel=0.02)
    assert counted["training"] == pytest.approx(2 * (teachers + 3 * students), rel=0.1)
