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
  data    dataset; default: scenes, of one or two large objects and 48 pixels
  evals   evaluators at the end, joined by +; default: linear_probe+map_probe+retrieval with scenes,
          and else retrieval, since probes need labels

Each trial takes as many steps as the budget pays for, by the FLOPs of `--dry_run`, with a batch of
64. Smaller images come first in three of four steps.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from cap_pretrain import config
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.sweeps.settings import RECIPE, model, values
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
    "cappa_small_first": ("cappa", {"data.first_sizes": "36:0.75"}),
    "cap+siglip+distill": ("cap+siglip+distill", {}),
    "aimv2": ("aimv2", {}),
}

# One or two large objects on gray, with captions of all kinds.
SCENES: dict[str, Any] = {
    "data.scenes.max_objects": 2,
    "data.scenes.smallest": 0.2,
    "data.scenes.shapes": 4,
    "data.scenes.patterns": False,
    "data.scenes.backgrounds": False,
    "text.vocab_size": 256,
    "text.length": 24,
}
PHOTOGRAPHS: dict[str, Any] = {"text.vocab_size": 2000, "text.length": 24}


def sweep(arg: str | None = None) -> Iterator[Trial]:
    """Yield the trials of `what=…,seeds=…,steps=…,size=…,data=…,evals=…`."""
    args = config.arguments(
        arg,
        what="",
        seeds="0+1+2",
        steps="2000",
        size="96x3",
        data="scenes",
        evals="",
    )
    drawn = args.data == "scenes"
    evals = args.evals or ("linear_probe+map_probe+retrieval" if drawn else "retrieval")
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
    }
    training = functools.partial(_trial, shared, args.data, evals)
    (cap_steps,) = values("steps", args.steps, int)
    budget = cap_steps * _flops(training("cap", 0).resolved())
    for name, seed in itertools.product(names, values("seeds", args.seeds, int)):
        one = training(name, seed)
        steps = round(budget / _flops(one.resolved()))
        yield Trial(one.name, one.config, {**one.overrides, "total_steps": steps})


def _trial(shared: dict[str, Any], data: str, evals: str, name: str, seed: int) -> Trial:
    objective, fields = VARIANTS[name]
    arguments = f"objective={objective},data={data},evals={evals}"
    overrides = {**shared, "seed": seed, **fields}
    return Trial(
        f"{name.replace('%', '')}_seed={seed}", f"configs/pretrain.py:{arguments}", overrides
    )


def _flops(one: Any) -> float:
    """Return the mean FLOPs of training for an example over a run with this config."""
    phases = phases_of(one, 1000)
    steps = [phase.stop - phase.start for phase in phases]
    return float(np.average(plan.training_flops(phases, one.text.vocab_size), weights=steps))
