"""Fine-tune an encoder to classify, with all labels or a fraction of them.

python -m cap_pretrain.main --config=configs/finetune.py:data=data/imagenette,fraction=0.1 \
    --workdir=runs/finetuned --config.encoder=runs/cappa

Arguments:
  data      dataset with labels; default: scenes
  fraction  fraction of the labels, the same for every class and every encoder; usually 0.01, 0.1
            or 1; default: 1
  head      linear: a linear layer on the encoder's pooled vector, initialized with zeros; map:
            attention pooling of all tokens before it, initialized randomly, for encoders whose
            pooled vector was not trained, as those of captioners; default: linear

The recipe is that of Dosovitskiy et al. 2020 (2010.11929, appendix B.1.1): SGD with momentum, no
weight decay, cosine decay, gradients clipped at 1. They try learning rates 0.003, 0.01, 0.03, 0.06.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `data=…,fraction=…,head=linear|map` (see the module's docstring)."""
    args = config.arguments(arg, data="scenes", fraction="1", head=("linear", "map"))
    c = config.default()
    c.data.name = args.data
    c.data.fraction = float(args.fraction)
    if args.data == "scenes":
        c.data.scenes.length_train = 20_000
    layer = "tokens" if args.head == "map" else "pooled"
    c.learner = learners.defaults("classifier", head=args.head, layer=layer)
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
