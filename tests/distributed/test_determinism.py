"""What `config.deterministic` does for GPUs, as far as it can be tested without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.distributed import determinism, sharding
from cap_pretrain.training import step
from tests import toy

OBJECTIVES = {
    "cap": ("captioner", {"parallel_fraction": 0.0}),
    "cappa": ("captioner", {"parallel_fraction": 0.75, "label_smoothing": 0.1}),
    "clip": ("dual_encoder", {"contrast": "softmax"}),
    "siglip": ("dual_encoder", {"contrast": "sigmoid"}),
    "simclr": ("simclr", {}),
}
# The default run lowers these; `cap` and `siglip` differ from two of them in the loss only.
FAST = ("cappa", "clip", "simclr")


def prepared_step(objective, **fields):
    learner, options = OBJECTIVES[objective]
    c = toy.config(learner, options, model__depth=1, model__width=32, model__mlp=64, **fields)
    init, abstract, graphdef, tx, rate, mesh = toy.prepared(c)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    batch = {k: v for k, v in toy.batch(c).items() if k != "label"}
    take = step.make_train_step(graphdef, tx, rate, c, shardings)
    return take, init, sharding.put_batch(batch, mesh)


@pytest.mark.parametrize(
    "objective",
    [o if o in FAST else pytest.param(o, marks=pytest.mark.slow) for o in OBJECTIVES],
)
def test_a_step_has_no_scatter_which_gpus_would_serialize(objective):
    take, init, batch = prepared_step(objective, deterministic=True)
    program = take.lower(jax.eval_shape(init), batch).as_text()
    assert "stablehlo.dot_general" in program and "stablehlo.scatter" not in program


@pytest.mark.slow
def test_the_switch_changes_nothing_but_rounding():
    """Only rounding differs. The compiler refuses unknown options, so the names are valid."""
    norms = []
    for deterministic in (False, True):
        take, init, batch = prepared_step(
            "cappa", deterministic=deterministic, optim__warmup_share=0.0
        )
        state, _ = take(init(), batch)  # the zero-initialized output layer blocks gradients
        norms.append(jax.device_get(take(state, batch)[1]))
    assert norms[0]["grad_norm"] > 0.01
    for name, value in norms[0].items():
        np.testing.assert_allclose(norms[1][name], value, rtol=1e-5, err_msg=name)
    with pytest.raises(Exception, match="xla_gpu_no_such"):
        jax.jit(jnp.sin, compiler_options={"xla_gpu_no_such": True})(1.0)


def test_rows_of_a_table_have_the_gradient_of_indexing():
    table = jax.random.normal(jax.random.key(0), (5, 3))
    index = jnp.array([[4, 1, 1], [0, 4, 4]])
    weight = jax.random.normal(jax.random.key(1), (2, 3, 3))
    expected, found = (
        jax.value_and_grad(lambda t, rows=rows: jnp.sum(jnp.sin(rows(t)) * weight))(table)
        for rows in (lambda t: t[index], lambda t: determinism.rows_of(t, index))
    )
    np.testing.assert_allclose(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)


def test_nvlink_sums_are_disabled_unless_the_user_set_nccl_algo(monkeypatch):
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    determinism.set_environment(toy.config())
    assert "NCCL_ALGO" not in determinism.os.environ
    determinism.set_environment(toy.config(deterministic=True))
    assert determinism.os.environ["NCCL_ALGO"] == "^NVLS"
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    determinism.set_environment(toy.config(deterministic=True))
    assert determinism.os.environ["NCCL_ALGO"] == "Ring"
