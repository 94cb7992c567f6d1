"""Evaluate an encoder's features with linear probes and nearest neighbors.

python -m cap_pretrain.main --config=configs/linear_probe.py:data=data/imagenette \
    --workdir=runs/probed --config.encoder=runs/cappa

Arguments:
  data      dataset with labels; default: scenes
  protocol  lbfgs or sgd; default: lbfgs

protocol=lbfgs trains nothing in the training loop. It computes features once, keeps them in the
workdir, and evaluates a logistic regression fitted to convergence (`linear_probe`), ridge
regressions on 1, 5 and 10 images per class (`few_shot`), and nearest neighbors (`knn`).

protocol=sgd trains a linear layer on augmented images in the training loop, as for published
results of self-supervised encoders. Settings are VISSL's (benchmark/linear_image_classification/
imagenet1k/eval_resnet_8gpu_transfer_in1k_linear.yaml), with cosine decay in place of three steps of
the learning rate. Like VISSL, scale `optim.lr` with the batch size.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `data=…,protocol=lbfgs|sgd` (see the module's docstring)."""
    args = config.arguments(arg, data="scenes", protocol=("lbfgs", "sgd"))
    c = config.default()
    c.data.name = args.data
    if args.data == "scenes":  # it is endless, and a probe reads the whole dataset
        c.data.scenes.length_train = 20_000
    if args.protocol == "lbfgs":
        c.learner = learners.defaults("pretrained")
        probes = ("linear_probe", "few_shot", "knn")
        c.evals = ConfigDict({name: evals.defaults(name) for name in probes})
        return c
    c.learner = learners.defaults("classifier", batch_norm=True)
    c.total_epochs = 28.0
    c.batch_size = 256
    c.data.crop = "random"
    c.data.flip = True
    c.optim.name = "sgd"
    c.optim.lr = 0.01
    c.optim.clip_norm = 0.0
    c.optim.weight_decay = 5e-4
    c.optim.decay_rules = (("head/bias", 1.0),)
    c.optim.lr_rules = (("encoder/.*", 0.0),)
    c.optim.warmup_share = 0.0
    c.evals = ConfigDict({"accuracy": evals.defaults("accuracy")})
    return c
