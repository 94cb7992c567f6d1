"""Train a transformer decoder to find what expressions refer to, on a frozen encoder.

python -m cap_pretrain.main --config=configs/referring.py:data=data/refcoco \
    --workdir=runs/referring --config.encoder=runs/cappa

Arguments:
  data   dataset with regions, or a mixture with weights such as A:0.7+B:0.3; default: scenes

The decoder reads an expression and writes its box, which is the task "aref" of the learner locca;
at the end, `boxes` is the accuracy by expression. The encoder may come from any learner. Depth and
width of the decoder are those of configs/coco_captioning.py; `--config.model.decoder_depth` changes
them. `--config.optim.lr_rules=()` trains the encoder too.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `data=…` (see the module's docstring)."""
    args = config.arguments(arg, data="scenes")
    c = config.default()
    c.total_epochs = 10.0
    c.batch_size = 256
    c.model.decoder_depth = 12
    c.learner = learners.defaults("locca", cap_weight=0.0, gcap_weight=0.0, conditional=True)
    c.data.name = args.data
    c.optim.lr_rules = (("encoder/.*", 0.0),)
    c.optim.warmup_share = 0.05
    c.evals = ConfigDict(
        {
            "val": evals.defaults("loss"),
            "boxes": evals.defaults("referring", when="end"),
        }
    )
    return c
