"""Linear probes of an encoder: what a linear classifier finds in what it gives.

python -m cap_pretrain.main --config=configs/linear_probe.py:data=imagenette \
    --workdir=runs/probed --config.encoder=runs/cappa

By default nothing is trained by the loop. Features are computed once and kept in the workdir; to
them are fitted a logistic regression to its minimum (`linear_probe`), ridge regressions on 1, 5 and
10 images of each class (`few_shot`), and none at all (`knn`).

`protocol=sgd` has the loop train the linear layer on augmented images, as the published numbers of
self-supervised encoders are: VISSL's settings (benchmark/linear_image_classification/imagenet1k/
eval_resnet_8gpu_transfer_in1k_linear.yaml), but for a cosine in place of three steps of the rate.
For another batch size scale `optim.lr` by it, as they do.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `data=…,protocol=lbfgs|sgd`."""
    args = config.arguments(arg, data="scenes", protocol=("lbfgs", "sgd"))
    c = config.default()
    c.data.name = args.data
    if args.data == "scenes":  # there is no end of it, and a probe reads all
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
