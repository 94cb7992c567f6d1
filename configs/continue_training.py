"""Continue the training of a whole pretrained learner: another library's CLIP or SigLIP, or a run.

python -m cap_pretrain.main --workdir=runs/tuned --config.encoder=downloads/clip \
    --config=configs/continue_training.py:data=flickr8k

Text tower, projections and tokenizer are those found there, as well as the encoder.

Arguments:
  data  dataset with captions; default: scenes

The recipe is ours: AdamW, a rate far below that of pretraining, and little warm-up.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `data=…` (see the module's docstring)."""
    args = config.arguments(arg, data="scenes")
    c = config.default()
    c.learner = learners.defaults("pretrained")
    c.data.name = args.data
    c.total_epochs = 5.0
    c.batch_size = 256
    c.optim.name = "adamw"
    c.optim.lr = 1e-5
    c.optim.warmup_share = 0.05
    c.evals = ConfigDict({"val": evals.defaults("loss"), "retrieval": evals.defaults("retrieval")})
    return c
