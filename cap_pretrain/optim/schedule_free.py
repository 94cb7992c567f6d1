"""Schedule-free learning (Defazio et al. 2024, 2405.15682): averages in place of a decaying rate.

The gradient is taken at parameters y between the iterate z and its average x, which is evaluated.
The training state has y as `params`, x as `ema`, and z in the state of the optimizer.
"""

from typing import Any

import jax
import optax
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

NAME = "schedule_free"


def averaged(opt_state: Any, params: Any) -> Any:
    """Return x, the parameters to evaluate, for the parameters y; frozen ones are unchanged."""
    (found,) = filter(_is_state, jax.tree.leaves(opt_state, is_leaf=_is_state))

    def moving(z, y):
        return z if _is_masked(z) else y

    y = jax.tree.map(moving, found.z, params, is_leaf=_is_masked)
    x = schedule_free_eval_params(found, y)
    return jax.tree.map(lambda x, p: p if _is_masked(x) else x, x, params, is_leaf=_is_masked)


def restarted(opt_state: Any, params: Any) -> Any:
    """Return the state of an optimizer, before the first step, for other initial parameters.

    That of any other optimizer does not depend on them.
    """

    def restart(state):
        if not _is_state(state):
            return state
        z = jax.tree.map(
            lambda z, p: z if _is_masked(z) else p.astype(z.dtype).copy(),
            state.z,
            params,
            is_leaf=_is_masked,
        )
        return state._replace(z=z)

    return jax.tree.map(restart, opt_state, is_leaf=_is_state)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _is_state(x: Any) -> bool:
    return isinstance(x, ScheduleFreeState)
