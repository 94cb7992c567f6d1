"""Evaluate a trained run or a pretrained encoder without further training.

python -m cap_pretrain.main --workdir=runs/evaluated --config.encoder=runs/cappa \
    --config=configs/evaluate.py:evals=linear_probe+knn,data=data/imagenette

Arguments:
  evals  names of evaluators, joined by +; default: loss. `--config.evals.NAME.OPTION=…` changes
         their options. Learners support different evaluators: an encoder alone can be probed, but
         it cannot caption images or rank captions.
  data   dataset; default: the training data of the run in `--config.encoder`
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `evals=NAME+NAME+…,data=…` (see the module's docstring)."""
    args = config.arguments(arg, evals="loss", data="")
    c = config.default()
    c.learner = learners.defaults("pretrained")
    c.data.name = args.data
    c.evals = ConfigDict({name: evals.defaults(name) for name in args.evals.split("+")})
    return c
