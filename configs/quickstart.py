"""Train a small CapPa on generated scenes in minutes on a CPU.

python -m cap_pretrain.main --config=configs/quickstart.py --workdir=runs/quickstart

At the end, the captions of about nine in ten of 500 unseen images should name the color and shape
of every object. To make this possible in minutes, the scenes are simpler than by default: at most
two objects, which are large, four shapes, no patterns, plain backgrounds and plain captions.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners


def get_config() -> ConfigDict:
    """Return the config of a small CapPa on simple scenes; it takes no arguments."""
    c = config.default()
    c.total_steps = 5000
    c.batch_size = 64
    c.model.name = "mu/12"
    c.model.width = 96
    c.model.depth = 3
    c.model.mlp = 384
    c.model.heads = 4
    c.model.decoder_depth = 2
    c.model.unroll = 3
    # The paper's 0.75 leaves a short run too few autoregressive examples to learn decoding.
    c.learner = learners.defaults("captioner", parallel_fraction=0.5)
    c.data.image_size = 48
    c.data.scenes.max_objects = 2
    c.data.scenes.smallest = 0.2
    c.data.scenes.shapes = 4
    c.data.scenes.patterns = False
    c.data.scenes.backgrounds = False
    c.data.scenes.plain_captions = True
    c.data.scenes.synonyms = False
    c.text.vocab_size = 128
    c.text.length = 12
    c.optim.name = "adamw"
    c.optim.lr = 1e-3
    c.optim.weight_decay = 0.01
    c.optim.warmup_share = 0.05
    c.log.every_steps = 100
    c.evals = ConfigDict(
        {
            "val": evals.defaults("loss", limit=1000, unigram=True),
            "samples": evals.defaults("captions", count=8, when="end"),
            "scenes": evals.defaults("scene_captions"),
        }
    )
    return c
