"""LiT: a text tower tuned to a frozen encoder, from its pooled vector or by attention pooling."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from cap_pretrain import train
from cap_pretrain.checkpoints.load import read_weights
from cap_pretrain.errors import UserError
from cap_pretrain.learners.dual_encoder import DualEncoder
from cap_pretrain.telemetry import flops
from cap_pretrain.training import plan
from tests import tiny, toy

FROZEN = (("encoder/.*", 0.0),)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("head", ["none", "map"])
def test_vectors_are_those_of_torch(head):
    from tests import torch_reference

    split = tiny.split(tiny.config("dual_encoder", {"head": head}))
    images, texts = tiny.images(3), tiny.texts([7, 4, 0])

    def vectors(learner):
        return learner.embed_images(images), learner.embed_text(texts)

    params = split[1]
    assert ("image_pooling" in params) == (head == "map") and "image_projection" not in params
    encoder = params["encoder"]
    if head == "map":  # where it stands for the encoder's own pooling
        encoder = {**encoder, "head": params["image_pooling"]}
    identity = {"kernel": np.eye(16, dtype=np.float32), "bias": np.zeros(16, np.float32)}
    known = {**params, "encoder": encoder, "image_projection": identity}
    expected = torch_reference.dual_encoder(known, images, texts, tiny.HEADS)
    for ours, theirs in zip(tiny.jitted(split, vectors)(), expected, strict=False):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


@pytest.mark.slow
def test_texts_take_the_width_of_the_encoder():
    fields = dict(name="resnet18", depth=0, mlp=0, heads=0, width=8, decoder_width=32)
    fields |= dict(decoder_depth=1, decoder_mlp=32, decoder_heads=2)
    for head, width in (("linear", 32), ("none", 64), ("map", 64)):
        params = tiny.abstract(tiny.config("dual_encoder", {"head": head}, **fields))[1]
        assert params["text_projection"]["kernel"].shape == (32, width)
    assert params["image_pooling"]["mlp"]["up"]["kernel"].shape == (64, 256)


def test_of_a_frozen_encoder_only_the_forward_pass_is_computed():
    c = tiny.config("dual_encoder", {"head": "map"})
    graphdef, *variables = tiny.abstract(c)

    def encode(variables, images):
        return nnx.merge(graphdef, *variables).encode(images, train=True)

    images = jax.ShapeDtypeStruct((1, tiny.SIDE, tiny.SIDE, 3), np.uint8)
    encoder = flops.count_flops(encode, variables, images)
    learning = plan.flops_per_example(c, tiny.VOCAB)
    c.optim.lr_rules = FROZEN
    frozen = plan.flops_per_example(c, tiny.VOCAB)
    assert frozen["forward"] == learning["forward"]
    most = encoder + 3 * (frozen["forward"] - encoder)
    assert frozen["forward"] < frozen["training"] <= most < learning["training"]


@pytest.mark.slow
def test_a_run_of_lit_leaves_the_encoder_as_it_is(tokenizer_path, tmp_path):
    small = dict(model__depth=1, model__width=32, model__mlp=64)
    source = toy.config(text__tokenizer=str(tokenizer_path), **small)
    toy.saved_run(source, tmp_path / "cap", tokenizer_path, 1)
    arguments = f"encoder={tmp_path / 'cap'},contrast=sigmoid"
    c = toy.shrink(toy.load("lit", arguments), text__tokenizer=str(tokenizer_path), accumulate=2)
    c.evals.zero_shot.limit = c.evals.retrieval.limit = 10
    train.run(c, tmp_path / "lit")
    before, after = (read_weights(tmp_path / name).params for name in ("cap", "lit"))
    kept = {path for path in before if path.startswith("encoder/")}
    assert kept == {path for path in after if path.startswith("encoder/")}
    for path in kept:
        assert before[path].tobytes() == after[path].tobytes(), path
    for evaluator in ("zero_shot", "retrieval", "val"):
        assert (tmp_path / "lit" / "evals" / evaluator / "2.json").is_file()
    again = toy.load("evaluate", "evals=zero_shot")
    again.encoder = str(tmp_path / "lit")
    again.evals.zero_shot.limit = 10
    train.run(again, tmp_path / "again")
    found = [
        json.loads((tmp_path / name).read_text())["top1"]
        for name in ("lit/evals/zero_shot/2.json", "again/evals/zero_shot/0.json")
    ]
    assert found[0] == found[1]


def test_a_head_that_is_not_there():
    with pytest.raises(UserError, match="learner.head: 'maps' is unknown. Did you mean 'map'"):
        DualEncoder.Options(head="maps")
