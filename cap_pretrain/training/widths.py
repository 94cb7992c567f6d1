"""muP for a run: the parameters of its learner and those of the base model of `optim.mup`."""

import functools
import json
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import learners
from cap_pretrain.models.build import encoder_size
from cap_pretrain.models.narrowing import narrowed
from cap_pretrain.models.sizes import RESNETS
from cap_pretrain.optim import mup
from cap_pretrain.optim.mup import Mup

VOCABULARY = 97  # tokens of the learners that are compared; any number does


def rates(config: ConfigDict) -> Any:
    """Return the factor on the update of each parameter, or None without muP."""
    if not config.optim.mup.base_width:
        return None
    return mup.rates(*_compared(configs.to_json(config)))


def initial(config: ConfigDict, params: Any) -> Any:
    """Return the initial parameters of a run: those of muP, or without it `params`."""
    if not config.optim.mup.base_width:
        return params
    _, base, query = _compared(configs.to_json(config))
    return mup.initial(params, base, query)


@functools.lru_cache(maxsize=4)
def _compared(text: str) -> tuple[Any, Any, float]:
    """Return abstract parameters of a config in JSON and of its base, and the factor of queries."""
    config = ConfigDict(json.loads(text))
    base, query = narrowed(config), 1.0
    if config.model.name not in RESNETS:
        size = encoder_size(config)
        query = Mup(**config.optim.mup).query(size.width // size.heads)
    return _parameters(config), _parameters(base), query


def _parameters(config: ConfigDict) -> Any:
    learner = nnx.eval_shape(lambda: learners.build(config, VOCABULARY, jax.random.key(0)))
    return nnx.to_pure_dict(nnx.state(learner, nnx.Param))
