"""Captioning with a frozen encoder: a transformer decoder learns to caption from its tokens.

python -m cap_pretrain.main --config=configs/coco_captioning.py:data=data/coco \
    --workdir=runs/captioning --config.encoder=runs/cappa

The decoder has 12 layers of the encoder's width, as the paper's for B (Tschannen et al. 2023,
section 4.1); `--config.model.decoder_depth` changes that, and with `decoder_width=768`,
`decoder_mlp=3072` and `decoder_heads=12` it is of size B for any encoder. Encoder and decoder learn
together with `--config.optim.lr_rules=()`, or the encoder at a tenth of the rate with
"(('encoder/.*', 0.1),)".
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `data=…`, a captioned dataset."""
    args = config.arguments(arg, data="coco_captions")
    c = config.default()
    c.total_epochs = 10.0
    c.batch_size = 256
    c.model.decoder_depth = 12
    c.learner = learners.defaults("captioner", parallel_fraction=0.0)
    c.data.name = args.data
    c.optim.lr_rules = (("encoder/.*", 0.0),)
    c.optim.warmup_share = 0.05
    c.evals = ConfigDict(
        {
            "val": evals.defaults("loss", unigram=True),
            "samples": evals.defaults("captions"),
            "scores": evals.defaults("caption_scores", when="end"),
        }
    )
    return c
