"""Objectives at an equal budget of training FLOPs, everything else equal.

python tools/sweep.py run configs/sweeps/objectives.py --out runs/objectives --slots 2
python tools/sweep.py table runs/objectives --figures linear_probe/top1 map_probe/top1

Arguments, with lists joined by +:
  what    names of VARIANTS below, which are objectives of configs/pretrain.py, some with fewer
          tokens or smaller images first; joined by /; default: all, but locca only with scenes,
          since it needs boxes
  seeds   default: 0+1+2
  steps   the budget: that of so many steps of Cap; default: 2000
  size    encoder as WIDTHxDEPTH with patches of 12 pixels; default: 96x3
  data    dataset; default: scenes, of two large objects and 48 pixels
  labels  dataset with labels for the probes; default: that of `data`
  evals   evaluators at the end, joined by +; default: linear_probe+map_probe+retrieval+composition+
          caption_scores, without probes unless there are `labels` or scenes. Variants that write no
          captions have no caption_scores, and composition is that of captions where they do.

Each trial takes as many steps as the budget pays for, by the FLOPs of `--dry_run`, with a batch of
64. The learning rate is constant and decays linearly in the last 40%, so that it is still high when
smaller images, which come first in 60% of the steps, have ended.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from cap_pretrain import config, learners
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.learners.protocols import EmbedsText, WritesCaptions
from cap_pretrain.sweeps.settings import EASY_SCENES, RECIPE, model, values
from cap_pretrain.sweeps.trials import Trial
from cap_pretrain.training import plan
from cap_pretrain.training.phases import phases_of

# By name: the objective, and other fields that it sets.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cap": ("cap", {}),
    "cappa": ("cappa", {}),
    "clip": ("clip", {}),
    "siglip": ("siglip", {}),
    "coca": ("coca", {}),
    "cap+siglip": ("cap+siglip", {}),
    "locca": ("locca", {}),
    "cappa_reads_35%": (
        "cappa",
        {"model.keep_tokens": 0.35, "model.keep_tokens_at": "decoder"},
    ),
    "cappa_keeps_50%": ("cappa", {"model.keep_tokens": 0.5}),
    "cappa_small_first": ("cappa", {"data.first_sizes": "36:0.6"}),
    "cap+siglip+distill": (  # for the last fifth, as in SigLIP 2 (2502.14786)
        "cap+siglip+distill",
        {"learner.weights.distill": "0@0.8,1@0.81"},
    ),
    "aimv2": ("aimv2", {}),
}

# Two large objects on gray, with plain captions, so that each image has something to bind.
SCENES: dict[str, Any] = {
    **EASY_SCENES,
    "data.scenes.min_objects": 2,
    "data.scenes.smallest": 0.14,
    "text.length": 18,
}
PHOTOGRAPHS: dict[str, Any] = {"text.vocab_size": 2000, "text.length": 24}

EVALS = "linear_probe+map_probe+retrieval+composition+caption_scores"
# The same number of images for each variant. The rates of map_probe are those that were best on
# held-out images in RESULTS.md, with one on either side.
OPTIONS: dict[str, dict[str, Any]] = {
    "linear_probe": {"train_limit": 4000, "limit": 2000},
    "map_probe": {
        "train_limit": 4000,
        "limit": 2000,
        "lr": (3e-4, 1e-3, 3e-3, 1e-2),
        "weight_decay": (0.3,),
    },
    "retrieval": {"limit": 100},
    "composition": {"limit": 500},
    "caption_scores": {"limit": 500},
}
PROBES = ("linear_probe", "map_probe")


def sweep(arg: str | None = None) -> Iterator[Trial]:
    """Yield the trials of `what=…,seeds=…,steps=…,size=…,data=…,labels=…,evals=…`."""
    args = config.arguments(
        arg,
        what="",
        seeds="0+1+2",
        steps="2000",
        size="96x3",
        data="scenes",
        labels="",
        evals="",
    )
    drawn = args.data == "scenes"
    names = args.what.split("/") if args.what else [n for n in VARIANTS if drawn or n != "locca"]
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"what: no variant {name!r}.{did_you_mean(name, VARIANTS)}")
    shared: dict[str, Any] = {
        "data.image_size": 48,
        **(SCENES if drawn else PHOTOGRAPHS),
        **model(args.size),
        "model.decoder_depth": 2,
        "batch_size": 64,
        "optim.lr": 1e-3,
        **RECIPE,
        "optim.decay": "constant",
        "optim.cooldown_share": 0.4,
    }
    default = [e for e in EVALS.split("+") if drawn or args.labels or e not in PROBES]
    wanted = args.evals.split("+") if args.evals else default
    training = functools.partial(_trial, shared, args.data, args.labels, wanted)
    (cap_steps,) = values("steps", args.steps, int)
    budget = cap_steps * _flops(training("cap", 0).resolved())
    for seed, name in itertools.product(values("seeds", args.seeds, int), names):
        one = training(name, seed)
        steps = round(budget / _flops(one.resolved()))
        yield Trial(one.name, one.config, {**one.overrides, "total_steps": steps})


def _trial(
    shared: dict[str, Any], data: str, labels: str, wanted: list[str], name: str, seed: int
) -> Trial:
    objective, fields = VARIANTS[name]
    training = f"objective={objective},data={data}"
    plain = Trial(name, f"configs/pretrain.py:{training}").resolved()
    captioners = [
        member.name
        for member in learners.members(plain)
        if issubclass(member.kind, WritesCaptions) and not issubclass(member.kind, EmbedsText)
    ]
    fitting = [e for e in wanted if captioners or e != "caption_scores"]
    overrides = {**shared, "seed": seed, **fields}
    for evaluator in fitting:
        for option, value in OPTIONS.get(evaluator, {}).items():
            overrides[f"evals.{evaluator}.{option}"] = value
        if evaluator in PROBES and labels:
            overrides[f"evals.{evaluator}.data"] = labels
        if evaluator == "composition" and any(captioners):  # in a joint learner, or in CoCa
            overrides["evals.composition.part"] = min(captioners)
    return Trial(
        f"{name.replace('%', '')}_seed={seed}",
        f"configs/pretrain.py:{training},evals={'+'.join(fitting)}",
        overrides,
    )


def _flops(one: Any) -> float:
    """Return the mean FLOPs of training for an example over a run with this config."""
    phases = phases_of(one, 1000)
    steps = [phase.stop - phase.start for phase in phases]
    return float(np.average(plan.training_flops(phases, one.text.vocab_size), weights=steps))
