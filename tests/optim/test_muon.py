"""Muon: each matrix of each layer is orthogonalized by itself, on any mesh; the rest is Adam."""

import ast
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cap_pretrain import rules
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.optim import muon, optimizers
from cap_pretrain.optim.muon import Muon
from cap_pretrain.rules import flatten
from tests import tiny, toy
from tests.layouts import mesh, on_eight_devices
from tests.optim.test_optimizers import section

RATE, STEPS = 0.05, 3
MATRICES = {
    "encoder/blocks/up/kernel": (3, 32, 64),  # stacked layers
    "encoder/blocks/down/kernel": (3, 64, 32),
    "encoder/head/attention/query/kernel": (32, 32),
    "encoder/unit/conv/kernel": (3, 3, 8, 16),
}
OTHERS = {
    "encoder/patch_embedding/kernel": (48, 32),
    "encoder/stem/conv/kernel": (3, 3, 3, 8),
    "encoder/blocks/up/bias": (3, 64),
    "encoder/positions": (16, 32),
    "decoder/embedding/embedding": (24, 32),
    "decoder/logits/kernel": (32, 24),
    "log_scale": (),
}


def test_the_rules_in_the_docs_are_for_what_adam_updates():
    text = (toy.CONFIGS.parent / "docs/optimizers.md").read_text()
    documented = ast.literal_eval(re.search(r"optim.lr_rules=(\(\(.*\)\))'", text)[1])
    _, params, _ = tiny.abstract(tiny.config(pool="map"))
    rates = rules.apply_rules(documented, params, default=1.0, field="optim.lr_rules")
    assert rates == jax.tree.map({"adam": 0.05, "muon": 1.0}.get, muon._kinds(params))


def tree(seed):
    """Return random parameters, or gradients, in nested dicts."""
    rng, nested = np.random.default_rng(seed), {}
    for path, shape in (MATRICES | OTHERS).items():
        *folders, name = path.split("/")
        inside = nested
        for folder in folders:
            inside = inside.setdefault(folder, {})
        inside[name] = np.asarray(rng.normal(size=shape), np.float32)
    return nested


def trained(c, shardings=None):
    """Return the parameters, flat, after STEPS with given gradients."""
    params = jax.tree.map(jnp.asarray, tree(0)) if shardings is None else None
    params = params or jax.device_put(tree(0), shardings)
    tx = optimizers.build(c, params, optax.constant_schedule(RATE))

    @jax.jit
    def step(gradient, state, params):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for number in range(1, STEPS + 1):
        gradient = tree(number) if shardings is None else jax.device_put(tree(number), shardings)
        params, state = step(gradient, state, params)
    return flatten(params)


def orthogonalized(matrix, steps):
    """Return the quintic Newton-Schulz iteration of Jordan et al. 2024, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = np.asarray(matrix, np.float64)
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def muon_in_numpy(path, *, beta, steps, rms, decay):
    """Return a parameter after STEPS, one matrix after another."""
    shape = MATRICES[path]
    last = shape if "conv" in path else shape[-2:]
    as_matrices = (-1, int(np.prod(last[:-1])), last[-1])
    p = flatten(tree(0))[path].reshape(as_matrices).astype(np.float64)
    for layer in range(len(p)):
        momentum = 0.0
        for t in range(1, STEPS + 1):
            g = flatten(tree(t))[path].reshape(as_matrices)[layer]
            momentum = beta * momentum + (1 - beta) * g
            ahead = beta * momentum / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
            inputs, outputs = g.shape
            scale = rms * max(inputs, outputs) ** 0.5 if rms else max(1, outputs / inputs) ** 0.5
            update = scale * orthogonalized(ahead, steps) + decay * p[layer]
            p[layer] = p[layer] - RATE * update
    return p.reshape(shape)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "steps": 4, "rms": 0.0}])
def test_each_layer_is_orthogonalized_by_itself_and_the_rest_is_adamw(options):
    fields = dict(clip_norm=0.0, weight_decay=0.1, b2=0.95)
    c = section(name="muon", **fields)
    c.muon.update(options)
    after, adamw = trained(c), trained(section(name="adamw", **fields))
    kwargs = dict(beta=c.muon.momentum, steps=c.muon.steps, rms=c.muon.rms, decay=0.1)
    for path in MATRICES:
        expected = muon_in_numpy(path, **kwargs)
        np.testing.assert_allclose(after[path], expected, atol=1e-4, err_msg=path)
        assert np.abs(after[path] - adamw[path]).max() > 1e-2, path
    for path in OTHERS:
        np.testing.assert_allclose(after[path], adamw[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_updates_have_the_rms_of_the_option():
    """Liu et al. 2025 (2502.16982), equation 4."""
    after = trained(section(name="muon", clip_norm=0.0, weight_decay=0.0))
    before = flatten(tree(0))
    for path in MATRICES:
        rms = np.sqrt(np.mean((after[path] - before[path]) ** 2)) / (RATE * STEPS**0.5)
        assert 0.1 < rms < 0.3, path


def differences(layout):
    """Return the largest difference of each parameter from one device, by path."""
    c = section(name="muon", lr_rules=((".*/down/kernel", 0.5),))
    there, here = trained(c, sharding.param_shardings(tree(0), mesh(layout))), trained(c)
    return {path: float(np.abs(there[path] - here[path]).max()) for path in here}


@pytest.mark.slow
def test_the_result_does_not_depend_on_the_mesh():
    """test_layouts.py trains and resumes a whole learner with Muon on every layout."""
    for found in on_eight_devices(differences, [("fsdp",), ("all",)]):
        assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum: 1.0 is not in \[0, 1\)"),
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"rms": -0.2}, "rms: -0.2 must not be negative"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(UserError, match=f"optim.muon.{message}"):
        Muon(**options)
