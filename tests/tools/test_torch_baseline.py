"""Tests of tools/torch_baseline.py: from our parameters it computes our loss and its gradient."""

import jax
import numpy as np
import pytest

from cap_pretrain.training.step import loss_and_stats
from tests import tiny
from tests.parity import require

torch = require("torch")

from tools import bench_step_worker, torch_baseline  # noqa: E402  # needs torch

pytestmark = [pytest.mark.parity, pytest.mark.slow]

CASES = {
    "cap": ("captioner", {"parallel_fraction": 0.0}, {}),
    "parallel": ("captioner", {"parallel_fraction": 1.0}, {"decoder_width": 24}),
    "clip": ("dual_encoder", {"contrast": "softmax"}, {}),
    "siglip": ("dual_encoder", {"contrast": "sigmoid"}, {"pool": "map"}),
}


@pytest.mark.parametrize(("learner", "options", "model"), CASES.values(), ids=CASES)
def test_loss_and_gradient_are_ours(learner, options, model):
    config = tiny.config(learner, options, **{"depth": 2, **model})
    config.text.vocab_size = tiny.VOCAB
    graphdef, params, stats = tiny.split(config)
    rng = np.random.default_rng(1)
    text = rng.integers(1, tiny.VOCAB, (5, tiny.LENGTH), np.int32)
    if learner == "captioner":
        text[0, 3:] = text[1, 5:] = 0  # padding does not count
    batch = {"image": tiny.images(5), "text": text}

    def loss_of(params):
        return loss_and_stats(graphdef, params, stats, batch, jax.random.key(0))

    (expected, _), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    model = torch_baseline.build(bench_step_worker.torch_shape(config))
    torch_baseline.load(model, params)
    found = model(torch.from_numpy(batch["image"]), torch.from_numpy(text).long())
    found.backward()
    np.testing.assert_allclose(found.item(), expected, rtol=1e-5)

    state = {name: p.grad for name, p in model.named_parameters()}
    torch_baseline.load(model, gradients)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(state[name], p.detach(), rtol=2e-3, atol=2e-6, err_msg=name)
    assert sum(p.numel() for p in model.parameters()) == sum(map(np.size, jax.tree.leaves(params)))
