"""Fine-tuning: encoder and linear layer learn to classify, from all labels or a part of them.

python -m cap_pretrain.main --config=configs/finetune.py:data=imagenette,fraction=0.1 \
    --workdir=runs/finetuned --config.encoder=runs/cappa

`fraction` of the labels, the same of every class and for every encoder; the usual ones are 0.01,
0.1 and 1. SGD with momentum without weight decay, cosine, gradients clipped at 1 as Dosovitskiy et
al. 2020 (2010.11929, appendix B.1.1), whose rates to try are 0.003, 0.01, 0.03 and 0.06.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `data=…,fraction=…`."""
    args = config.arguments(arg, data="scenes", fraction="1")
    c = config.default()
    c.data.name = args.data
    c.data.fraction = float(args.fraction)
    if args.data == "scenes":
        c.data.scenes.length_train = 20_000
    c.learner = learners.defaults("classifier")
    c.total_epochs = 30.0
    c.batch_size = 256
    c.data.crop = "random"
    c.data.flip = True
    c.optim.name = "sgd"
    c.optim.lr = 0.01
    c.optim.weight_decay = 0.0
    c.optim.warmup_share = 0.05
    c.evals = ConfigDict({"accuracy": evals.defaults("accuracy")})
    return c
