"""Joint learners: loss and gradient of their parts, weights over a run, a part of one's own."""

import copy
import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cap_pretrain import config as configs
from cap_pretrain import learners, rules, train
from cap_pretrain.checkpoints.load import read_config, read_weights
from cap_pretrain.cli import documentation
from cap_pretrain.convert.layouts import Source
from cap_pretrain.errors import UserError
from cap_pretrain.learners.parts import Part
from cap_pretrain.learners.protocols import EmbedsText, ScoresTexts, WritesCaptions
from cap_pretrain.learners.token_losses import mean_where
from cap_pretrain.learners.weights import Weight
from cap_pretrain.models.build import build_encoder
from cap_pretrain.models.layers import normalize_images
from cap_pretrain.training import plan, step
from cap_pretrain.training.changes import check_unchanged
from cap_pretrain.training.phases import phases_of
from cap_pretrain.validation import validate
from tests import tiny, toy
from tests.layouts import on_eight_devices

KEY = jax.random.key(3)
PARTS = {
    "cap": {"name": "captioner", "label_smoothing": 0.1},
    "siglip": {"name": "dual_encoder", "contrast": "sigmoid"},
}


def joint(dropout=0.1, **weights):
    """A tiny joint learner of captions and contrast, by default without a loss."""
    parts = {name: learners.defaults(**part).to_dict() for name, part in PARTS.items()}
    given = {"cap": "0", "siglip": "0"} | {k: str(v) for k, v in weights.items()}
    return tiny.config("joint", {"parts": parts, "weights": given}, dropout=dropout)


def alone(name, dropout=0.1):
    options = dict(PARTS[name])
    return tiny.config(options.pop("name"), options, dropout=dropout)


def own(params, name):
    """The parameters of a part, as a learner alone has them."""
    return {"encoder": params["encoder"], **params["parts"][name]}


BATCH = {
    "image": tiny.images(6),
    "text": tiny.texts([7, 4, 3, 1, 6, 7]),
    "prompt": np.array([0, 2, 0, 0, 1, 0], np.int32),
    "mask": np.array([True, True, False, True, True, True]),
}


def gradients(c, params, accumulate=1, **batch):
    """The gradient of a learner's training loss, and its metrics."""
    graphdef, _, stats = tiny.abstract(c)
    compute = jax.jit(functools.partial(step.accumulated_gradients, graphdef, parts=accumulate))
    grads, metrics, _ = compute(params, stats, BATCH | batch, KEY)
    return jax.device_get((grads, metrics))


@pytest.fixture(scope="module")
def params():
    return tiny.split(joint(cap=1, siglip=1))[1]


@pytest.mark.slow
def test_a_part_alone_computes_the_bits_of_that_learner(params):
    for name in PARTS:
        grads, metrics = gradients(joint(**{name: 1}), params)
        expected, theirs = gradients(alone(name), own(params, name))
        toy.assert_same(own(grads, name), expected)
        (idle,) = {*PARTS} - {name}
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["parts"][idle]))
        assert metrics["loss"] == theirs["loss"] == metrics[f"{name}/loss"]
        assert metrics[f"{name}/loss_weight"] == theirs["loss_weight"]
        assert not any(key.startswith(idle) for key in metrics)


@pytest.fixture(scope="module")
def separate(params):
    """Gradient and metrics of each part as a learner alone."""
    return {name: gradients(alone(name, 0), own(params, name)) for name in PARTS}


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_gradient_is_the_weighted_sum_of_those_of_the_parts(params, separate, accumulate):
    found, weights = copy.deepcopy(separate), {"cap": 2.0, "siglip": 0.5}
    grads, metrics = gradients(joint(0, **weights), params, accumulate)
    expected = sum(weight * found[name][1]["loss"] for name, weight in weights.items())
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    shared = jax.tree.map(
        lambda *g: sum(w * part for w, part in zip(weights.values(), g, strict=True)),
        *(found[name][0].pop("encoder") for name in weights),
    )
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(close, grads["encoder"], shared)
    for name, weight in weights.items():
        expected = jax.tree.map(lambda g, w=weight: w * g, found[name][0])
        jax.tree.map(close, grads["parts"][name], expected)
        for metric, value in found[name][1].items():
            assert metrics[f"{name}/{metric}"] == pytest.approx(value, rel=1e-4)


def test_weights_of_a_run():
    weight = Weight.parse("0@0.5,1@0.75,0.5@1", "field")
    shares = [0, 0.5, 0.6, 0.75, 1]
    assert [weight.then(share) for share in shares] == pytest.approx([0, 0, 0.4, 1, 0.5])
    found = [float(weight.at(jnp.float32(share))) for share in shares]
    assert found == pytest.approx([0, 0, 0.4, 1, 0.5])
    assert weight.zeros() == [(0, 0.5)]
    assert Weight.parse("1@0.1,0@0.2,0@0.4,0@0.6,1@0.7,0@0.8", "").zeros() == [(0.2, 0.6), (0.8, 1)]
    assert weight.at(None) == 0.5 and weight.ever and not weight.constant
    assert Weight.parse("2", "field").at(jnp.float32(0.3)) == 2.0
    for text, why in {
        "many": "'many' is not a weight; write a number",
        "1@0.5,2": "is not a weight",
        "-1": "negative or not finite",
        "nan": "negative or not finite",
        "1@0.5,0@0.5": "shares of the run that increase",
        "1@2": "shares of the run that increase",
    }.items():
        with pytest.raises(UserError, match=f"^field: .*{why}"):
            Weight.parse(text, "field")


def test_mistakes_in_a_config_are_named():
    for change, why in (
        ({"parts": {"cap": {"name": "captionr"}}}, "no learner 'captionr'"),
        ({"parts": {"cap": {"name": "rotation"}}}, "learner.parts.cap.name: a rotation cannot"),
        ({"parts": {"cap": {"name": "recurrent"}}}, "a recurrent cannot share its encoder"),
        ({"parts": {"cap": {"name": "joint"}}}, "a joint cannot share its encoder"),
        (
            {"parts": {"cap": {"name": "captioner", "parallel_fraction": 2.0}}},
            "^learner.parts.cap.parallel_fraction: 2.0 is not in",
        ),
        (
            {"parts": {"cap": {"name": "dual_encoder", "average": "token"}}},
            "^learner.parts.cap.average: is no option of dual_encoder",
        ),
        ({"parts": {"data": {"name": "captioner"}}}, "learner.parts.data: metrics of another kind"),
        ({"weights": {"cap": "1"}}, "has cap, but learner.parts has cap, siglip"),
    ):
        given = {"parts": PARTS, "weights": {"cap": "1", "siglip": "1"}} | change
        if "parts" in change:
            given["weights"] = {"cap": "1"}
        with pytest.raises(UserError, match=why):
            learners.defaults("joint", **given)
    with pytest.raises(UserError, match="learner.weights: all are 0 at 0 of the run"):
        validate(joint(siglip="0@0.5,1@0.6"))
    with pytest.raises(UserError, match="learner.parts: is empty"):
        validate(tiny.config("joint"))
    parts = {"distill": {"name": "distillation", "size": 6}}
    c = tiny.config("joint", {"parts": parts, "weights": {"distill": 1}})
    with pytest.raises(UserError, match="^learner.parts.distill.size: 6 is not a multiple"):
        tiny.abstract(c)


def test_options_of_parts_are_documented_and_may_change_like_those_of_learners(tmp_path):
    (found,) = [
        s for s in documentation.found("learner.parts.cap.average") if "captioner" in s.name
    ]
    assert "tokens of each caption" in found.entries[0].text
    c, path = joint(cap=1, siglip=1), tmp_path / "config.json"
    path.write_text(configs.to_json(c))
    with c.unlocked():
        c.learner.parts.siglip.ring = True  # affects how it is computed only
        c.learner.parts.cap.label_smoothing = 0.5
    with pytest.raises(UserError, match="learner.parts.cap.label_smoothing was 0.1, is now 0.5"):
        check_unchanged(c, path)
    field = "learner.parts.cap.label_smoothing"
    assert check_unchanged(c, path, [field]) == [f"{field} was 0.1, is now 0.5"]


def test_a_part_begins_and_ends_a_phase():
    c = joint(cap="1@0.5,0@0.75", siglip="0@0.25,1@0.5")
    found = phases_of(c, 8)
    assert [(p.start, p.stop, p.changed) for p in found] == [
        (0, 2, {"learner.weights.siglip": "0"}),
        (2, 6, {}),
        (6, 8, {"learner.weights.cap": "0"}),
    ]
    assert [learners.idle(p.config) for p in found] == [("parts/siglip/",), (), ("parts/cap/",)]


def test_parts_are_found_by_what_they_can_do():
    c = joint(cap=1, siglip=1)
    assert learners.reads(c) == ("image", "text", "prompt") and not learners.reads_progress(c)
    assert learners.reads_progress(joint(cap=1, siglip="0@0.5,1@1"))
    found = [
        learners.able(c, protocol, part)
        for protocol, part in (
            (ScoresTexts, ""),
            (ScoresTexts, "cap"),
            (WritesCaptions, ""),
            (WritesCaptions, "siglip"),
            (EmbedsText, ""),
        )
    ]
    assert [f and f.name for f in found] == ["siglip", "cap", "cap", None, "siglip"]
    assert found[0].config.learner.contrast == "sigmoid"
    with pytest.raises(
        UserError, match="'capp' is no part that this joint trains. Did you mean 'cap'"
    ):
        learners.able(c, ScoresTexts, "capp")
    c = joint(cap=1)  # the other part is never trained
    assert learners.able(c, ScoresTexts).name == "cap" and not learners.able(c, EmbedsText)
    with pytest.raises(
        UserError, match="'siglip' is no part that this joint trains. Choose from: cap"
    ):
        learners.able(c, ScoresTexts, "siglip")


def test_a_dual_encoder_is_exported_without_the_other_parts(params):
    c = joint(cap=1, siglip=1)
    source, left_out = Source(c, rules.flatten(params), None, "").dual_encoder()
    assert source.config.learner.to_dict() == c.learner.parts.siglip.to_dict()
    assert source.params.keys() == rules.flatten(tiny.abstract(alone("siglip"))[1]).keys()
    assert left_out == "the parts cap, which stay in the checkpoint"
    # A CoCa, which embeds texts, too, is no dual encoder.
    parts = {"coca": {"name": "coca"}, "siglip": PARTS["siglip"]}
    c = tiny.config("joint", {"parts": parts, "weights": dict.fromkeys(parts, "1")})
    source, left_out = Source(c, {}, None, "").dual_encoder()
    assert source.config.learner.name == "dual_encoder"
    assert left_out == "the parts coca, which stay in the checkpoint"


@pytest.mark.slow
def test_the_first_part_is_initialized_as_it_would_be_alone():
    c = joint(cap=1, siglip=1)
    together, single = (
        step.split_learner(learners.build(config, tiny.VOCAB, KEY))[1]
        for config in (c, alone("cap"))
    )
    toy.assert_same(own(together, "cap"), single)
    together, single = (
        step.split_learner(learners.build(config, tiny.VOCAB, KEY))[1]
        for config in (joint(siglip=1), alone("siglip"))
    )
    toy.assert_same(own(together, "siglip"), single)


class Brightness(Part):
    """A part of one's own: predicts the mean brightness of each image from the pooled vector."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`: what the target is multiplied by."""

        scale: float = 1.0

    reads = ("image",)

    def __init__(self, encoder, dtype, *, options: Options, rngs: nnx.Rngs):
        self.encoder, self.dtype, self.options = encoder, dtype, options
        self.head = nnx.Linear(encoder.width, 1, rngs=rngs)

    @classmethod
    def from_config(cls, config, vocab_size: int, rngs: nnx.Rngs) -> "Brightness":
        encoder, options = build_encoder(config, rngs), learners.options(config)
        return cls(encoder, jnp.float32, options=options, rngs=rngs)

    def encode(self, images, *, train=False, key=None):
        return self.encoder(normalize_images(images, self.dtype), train=train, key=key)

    def encoder_key(self, key):
        return key

    def rows(self, encoded, batch, key, train):
        target = self.options.scale * jnp.mean(batch["image"].astype(jnp.float32) / 255, (1, 2, 3))
        errors = (self.head(encoded.pooled.astype(jnp.float32))[:, 0] - target) ** 2
        return {"errors": errors, "counts": batch.get("mask", jnp.ones(len(errors), bool))}

    def reduce(self, rows):
        return mean_where(rows["errors"], rows["counts"]), {"loss_weight": jnp.sum(rows["counts"])}


@pytest.fixture
def brightness(monkeypatch):
    line = f"{__name__}:{Brightness.__name__}"
    monkeypatch.setitem(learners.REGISTRY, "brightness", line)


@pytest.mark.usefixtures("brightness")
def test_a_part_of_ones_own_is_composed_by_the_config():
    parts = {
        "cap": learners.defaults("captioner").to_dict(),
        "bright": learners.defaults("brightness", scale=2.0).to_dict(),
    }
    c = tiny.config("joint", {"parts": parts, "weights": {"cap": "1", "bright": "0.5"}})
    validate(c)
    counted, single = (plan.flops_per_example(d, tiny.VOCAB) for d in (c, alone("cap", 0)))
    assert 1 < counted["training"] / single["training"] < 1.02  # the encoder is counted once
    # A part with separate passes does not need that one.
    parts = {"aim": learners.defaults("aimv2").to_dict()}
    c = tiny.config("joint", {"parts": parts, "weights": {"aim": "1"}})
    counted, single = (
        plan.flops_per_example(d, tiny.VOCAB, ["forward"]) for d in (c, tiny.config("aimv2"))
    )
    assert counted == single


@pytest.mark.slow
@pytest.mark.usefixtures("brightness")
def test_a_joint_run_with_changing_weights_is_evaluated_and_resumes(tmp_path):
    def config():
        c = toy.load("pretrain", "objective=cap+siglip:0.5")
        with c.unlocked():
            c.learner.parts.bright = learners.defaults("brightness")
            c.learner.weights.bright = "0@0.5,1@1"
        fields = {"checkpoint__every_steps": 1, "checkpoint__keep_last": 4, "eval__every_steps": 4}
        return toy.shrink(c, total_steps=4, **fields)

    train.run(config(), tmp_path / "run")
    lines = toy.losses(tmp_path / "run")
    assert [line.get("train/bright/weight") for line in lines] == [None, None, 0, 0.5]
    for line in lines:
        parts = [p for p in ("bright", "cap", "siglip") if f"train/{p}/weight" in line]
        whole = sum(line[f"train/{p}/weight"] * line[f"train/{p}/loss"] for p in parts)
        assert line["train/loss"] == pytest.approx(whole, rel=1e-5)
        assert "train/loss_weight" not in line and "train/cap/loss_weight" not in line
    (found,) = [line for line in toy.lines(tmp_path / "run") if "val/loss" in line]
    assert found["val/loss"] == pytest.approx(
        found["val/cap/loss"] + 0.5 * found["val/siglip/loss"] + found["val/bright/loss"], rel=1e-5
    )
    # A part that has not begun stays as it is, also without weight decay.
    before, still, after = (read_weights(tmp_path / "run", at).params for at in (1, 2, 4))
    kernel = "parts/bright/head/kernel"
    assert np.array_equal(before[kernel], still[kernel])
    assert not np.array_equal(before[kernel], after[kernel])
    assert read_config(tmp_path / "run").learner == config().learner
    whole = read_weights(tmp_path / "run", 4)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    train.run(config(), tmp_path / "run")
    toy.assert_same(read_weights(tmp_path / "run", 4).params, whole.params)


def loss_on(name, devices):
    """Return the training loss of a batch and the norm of its gradient on one or eight devices."""
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    graphdef, params, stats = tiny.split(
        joint(0, cap=1, siglip=1) if name == "joint" else tiny.config("coca", {"queries": 5})
    )
    mesh = Mesh(np.reshape(jax.devices()[:devices], (-1, 1)), ("data", "fsdp"))
    batch = {"image": tiny.images(16), "text": tiny.texts([1, 3, 5, 7] * 4)}
    batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))

    def loss(params, batch):
        return nnx.merge(graphdef, params, stats).loss(batch, jax.random.key(0), True)[0]

    with jax.set_mesh(mesh):
        value, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    return float(value), float(optax.tree.norm(gradient))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["joint", "coca"])
def test_eight_devices_learn_what_one_learns(name):
    one, eight = on_eight_devices(loss_on, [(name, 1), (name, 8)])
    np.testing.assert_allclose(one, eight, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["joint", "coca"])
def test_half_precision_computes_about_the_same(name):
    def losses(dtype):
        c = joint(0, cap=1, siglip=1) if name == "joint" else tiny.config("coca", {"queries": 5})
        c.dtype = dtype
        graphdef, params, stats = tiny.split(c)
        loss, _ = jax.jit(lambda p: step.loss_and_stats(graphdef, p, stats, BATCH, KEY))(params)
        return float(loss)

    assert losses("bfloat16") == pytest.approx(losses("float32"), rel=0.03)
