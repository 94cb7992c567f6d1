"""CapPa on `scenes`, on a CPU, in minutes.

python -m cap_pretrain.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners


def get_config() -> ConfigDict:
    """Returns the configuration: a small CapPa, scenes of one or two objects, full captions."""
    c = config.default()
    c.total_steps = 1500
    c.batch_size = 128
    c.dtype = "float32"
    c.model.name = "mu/8"
    c.model.width = 128
    c.model.depth = 4
    c.model.mlp = 512
    c.model.heads = 4
    c.learner = learners.defaults("captioner", parallel_fraction=0.75)
    c.data.image_size = 48
    c.data.scenes.max_objects = 2
    c.data.scenes.partial_captions = False
    c.text.length = 24
    c.text.vocab_size = 256
    c.optim.name = "adamw"
    c.optim.lr = 2e-3
    c.optim.warmup_share = 0.1
    c.optim.b2 = 0.95
    c.eval.every_share = 0.2
    c.evals = ConfigDict(
        {
            "val": evals.defaults("loss", limit=1000, unigram=True),
            "scenes": evals.defaults("scene_captions"),
            "samples": evals.defaults("captions", when="end"),
        }
    )
    return c
