"""Recurrent layers: LSTM and GRU with torch's gate order, and the loop over positions.

Parameters are float32 and products are computed in `Compute.dtype`. States and gates are float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cap_pretrain.models.layers import REMAT_POLICIES, Compute

ORTHOGONAL = nnx.initializers.orthogonal()

State = Any  # leaves [R, ...], one row per caption


def over_time(
    advance: Callable[[State, Any], tuple[State, Any]],
    state: State,
    inputs: jax.Array,
    compute: Compute,
) -> tuple[Any, State]:
    """Scan `advance(state, input [R, G]) -> (state, output [R, ...])` over inputs [R, T, G].

    Args:
        advance: Function of one position.
        state: Initial state.
        inputs: [R, T, G].
        compute: Its rematerialization policy applies to each position.

    Returns:
        The outputs, [R, T, ...] each, and the last state.
    """
    if compute.remat not in ("none", "auto", "lean"):  # "lean" names activations of transformers
        policy = REMAT_POLICIES[compute.remat]
        advance = jax.checkpoint(advance, policy=policy, prevent_cse=False)
    state, outputs = jax.lax.scan(advance, state, jnp.moveaxis(inputs, 1, 0))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), outputs), state


class LSTM(nnx.Module):
    """An LSTM layer with torch's gate order: input, forget, candidate, output.

    The forget gate starts open, with a bias of 1 (Jozefowicz et al. 2015; Keras), to retain early
    inputs such as the image.

    Args:
        width: D, width of the input.
        hidden: H, width of the state.
        compute: precision and rematerialization.
    """

    def __init__(self, width: int, hidden: int, *, compute: Compute, rngs: nnx.Rngs):
        def open_forget_gate(_key, shape, dtype=jnp.float32):
            return jnp.zeros(shape, dtype).at[hidden : 2 * hidden].set(1)

        kwargs = dict(dtype=compute.dtype, rngs=rngs)
        self.input = nnx.Linear(width, 4 * hidden, bias_init=open_forget_gate, **kwargs)
        self.recurrent = nnx.Linear(
            hidden, 4 * hidden, use_bias=False, kernel_init=ORTHOGONAL, **kwargs
        )
        self.hidden, self.compute = hidden, compute

    def zero(self, rows: int) -> State:
        """Return the zero state: h and c, [rows, H] each."""
        return (jnp.zeros((rows, self.hidden)),) * 2

    def advance(self, state: State, gates: jax.Array) -> State:
        """Advance by one position; `gates` [R, 4 H] is the contribution of the input."""
        h, c = state
        gates = gates.astype(jnp.float32) + self.recurrent(h).astype(jnp.float32)
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def __call__(self, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        """Read x [R, T, D]; return h at every position, [R, T, H], and the last state."""

        def advance(state, gates):
            state = self.advance(state, gates)
            return state, state[0]

        return over_time(advance, state, self.input(x), self.compute)


class GRU(nnx.Module):
    """A GRU layer with torch's gate order: reset, update, candidate.

    Args:
        width: D, width of the input.
        hidden: H, width of the state.
        reset: "after" or "before"; see `models.recurrent.Options`.
        compute: precision and rematerialization.
    """

    def __init__(self, width: int, hidden: int, *, reset: str, compute: Compute, rngs: nnx.Rngs):
        kwargs = dict(dtype=compute.dtype, rngs=rngs)
        self.input = nnx.Linear(width, 3 * hidden, **kwargs)
        self.recurrent = nnx.Linear(
            hidden, 2 * hidden, use_bias=False, kernel_init=ORTHOGONAL, **kwargs
        )
        # With reset "before", a bias here would duplicate that of the input. With "after", the
        # reset gate scales the bias, too.
        self.candidate = nnx.Linear(
            hidden, hidden, use_bias=reset == "after", kernel_init=ORTHOGONAL, **kwargs
        )
        self.hidden, self.reset, self.compute = hidden, reset, compute

    def advance(self, h: jax.Array, gates: jax.Array) -> jax.Array:
        """Return the new h [R, H]; `gates` [R, 3 H] is the contribution of the input."""
        gates = gates.astype(jnp.float32)
        recurrent = self.recurrent(h).astype(jnp.float32)
        both = jax.nn.sigmoid(gates[:, : 2 * self.hidden] + recurrent)
        reset, update = jnp.split(both, 2, axis=-1)
        if self.reset == "after":
            past = reset * self.candidate(h).astype(jnp.float32)
        else:
            past = self.candidate(reset * h).astype(jnp.float32)
        candidate = jnp.tanh(gates[:, 2 * self.hidden :] + past)
        return (1 - update) * candidate + update * h

    def __call__(self, x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Read x [R, T, D]; return h at every position, [R, T, H], and the last one."""

        def advance(h, gates):
            h = self.advance(h, gates)
            return h, h

        return over_time(advance, state, self.input(x), self.compute)
