"""Programs that are compiled in the background."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.distributed import heartbeat
from cap_pretrain.distributed.ahead import Ahead


def test_a_program_is_traced_at_once_and_used_where_it_fits():
    traced = []

    def double(tree, nothing):
        traced.append(tree["x"].shape)
        return {"y": 2 * tree["x"]}

    fn, x = jax.jit(double), jnp.arange(3.0)
    ahead = Ahead(fn, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}, None)
    assert traced == [(3,)]
    for _ in range(2):
        np.testing.assert_array_equal(ahead({"x": x}, None)["y"], [0, 2, 4])
    assert traced == [(3,)]
    other = Ahead(fn, {"x": jax.ShapeDtypeStruct((4,), x.dtype, sharding=x.sharding)}, None)
    np.testing.assert_array_equal(other({"x": x}, None)["y"], [0, 2, 4])  # left to the function


def test_a_process_that_ends_early_does_not_wait_for_a_program(monkeypatch):
    compiled, codes = threading.Event(), []
    lowered = SimpleNamespace(compile=compiled.wait)
    monkeypatch.setattr(heartbeat.os, "_exit", codes.append)
    waiting = Ahead(SimpleNamespace(lower=lambda: lowered))
    with pytest.raises(SystemExit):  # which follows only here, where `_exit` returns
        heartbeat.leave(2)
    compiled.set()
    assert waiting._compiled.result() and codes == [2]
