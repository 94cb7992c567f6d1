"""Pretrain an encoder with Cap, CapPa, CLIP, SigLIP or AIMv2; only the objective differs.

python -m cap_pretrain.main --workdir=runs/cappa \
    --config=configs/pretrain.py:objective=cappa,model=B/16,data=cc12m

Arguments:
  objective  cappa, cap, clip, siglip or aimv2; default: cappa
  model      size of the encoder, with its patch size; default: S/16
  data       dataset; default: scenes

The defaults are the recipe of the matched comparison in Tschannen et al. 2023 (arXiv 2306.07915):
366,500 steps with batches of 8192, for a TPU pod. On smaller machines, set
    --config.total_steps=… or --config.total_epochs=…, --config.batch_size=…
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners

OBJECTIVES = {
    "cappa": ("captioner", {"parallel_fraction": 0.75}),
    "cap": ("captioner", {"parallel_fraction": 0.0}),
    "clip": ("dual_encoder", {"contrast": "softmax"}),
    "siglip": ("dual_encoder", {"contrast": "sigmoid"}),
    "aimv2": ("aimv2", {}),
}


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `objective=cappa|cap|clip|siglip|aimv2,model=…,data=…`."""
    args = config.arguments(arg, objective=tuple(OBJECTIVES), model="S/16", data="scenes")
    learner, options = OBJECTIVES[args.objective]
    c = config.default()
    c.total_steps = 366_500
    c.model.name = args.model
    c.data.name = args.data
    c.learner = learners.defaults(learner, **options)
    # AIMv2's loss is also of patches, so that of a unigram model is no baseline of it.
    c.evals = ConfigDict({"val": evals.defaults("loss", unigram=learner == "captioner")})
    if learner in ("captioner", "aimv2"):
        c.evals.samples = evals.defaults("captions")
    return c
