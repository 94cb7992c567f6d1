"""Judges what is there already: a run of this program, or an encoder made elsewhere.

python -m cap_pretrain.main --workdir=runs/judged \
    --config=configs/evaluate.py:evals=linear_probe+knn,data=imagenette --config.encoder=runs/cappa

`evals` are names of evaluators, with their default options, which `--config.evals.NAME.OPTION=…`
changes. Not each fits all learners: an encoder alone can be probed, but neither captions nor ranks.
Without `data` it is what the run of `--config.encoder` was trained on.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `evals=NAME+NAME+…,data=…`."""
    args = config.arguments(arg, evals="loss", data="")
    c = config.default()
    c.learner = learners.defaults("pretrained")
    c.data.name = args.data
    c.evals = ConfigDict({name: evals.defaults(name) for name in args.evals.split("+")})
    return c
