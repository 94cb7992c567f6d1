"""Pretrain an encoder with Cap, CapPa, LocCa, CLIP, SigLIP, CoCa, AIMv2 or several of them.

python -m cap_pretrain.main --workdir=runs/cappa \
    --config=configs/pretrain.py:objective=cappa,model=B/16,data=data/cc12m

Arguments:
  objective  cappa, cap, locca (docs/locca.md), clip, siglip, coca, aimv2, distill or masked, or
             several joined by +, as cap+siglip, or cap+siglip:0.5 with a weight
             (docs/objectives.md); default: cappa
  model      size of the encoder, with its patch size; default: S/16
  data       dataset; default: scenes
  evals      evaluators that run at the end besides the loss, joined by +; default: none

The defaults are the recipe of the matched comparison in Tschannen et al. 2023 (arXiv 2306.07915):
366,500 steps with batches of 8192, for a TPU pod. On smaller machines, set
    --config.total_steps=… or --config.total_epochs=…, --config.batch_size=…
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners
from cap_pretrain.learners import objectives
from cap_pretrain.learners.protocols import Locates, WritesCaptions


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `objective=…,model=…,data=…,evals=…` (see the module's docstring)."""
    args = config.arguments(arg, objective="cappa", model="S/16", data="scenes", evals="")
    c = config.default()
    c.total_steps = 366_500
    c.model.name = args.model
    c.data.name = args.data
    c.learner = objectives.section(args.objective)
    # The losses of AIMv2 and LocCa are not of captions alone, so that of a unigram model is no
    # baseline of them.
    kinds = {member.config.learner.name for member in learners.members(c)}
    c.evals = ConfigDict({"val": evals.defaults("loss", unigram="captioner" in kinds)})
    if learners.able(c, WritesCaptions):
        c.evals.samples = evals.defaults("captions")
    if learners.able(c, Locates):
        c.evals.boxes = evals.defaults("referring")
    for name in filter(None, args.evals.split("+")):
        c.evals[name] = evals.defaults(name, when="end")
    return c
