"""Sweep over model sizes and training lengths for scaling laws of each objective.

python tools/sweep.py run configs/sweeps/scaling.py --out runs/scaling --slots 2
python tools/sweep.py plot runs/scaling --x total_examples --y val/loss --by objective \
    model.width --out examples.png
python tools/sweep.py plot runs/scaling --x flops --y val/loss --by objective --frontier \
    --out flops.png

Arguments, with lists joined by +:
  sizes       encoders as WIDTHxDEPTH or named sizes; default: 32x2+48x2+64x3+96x4
  examples    numbers of training examples; default: 16000+32000+64000+128000
  objectives  objectives of configs/pretrain.py; default: cap+clip
  rates       learning rates, tried for every trial; default: 0.001
  batch       batch size; default: 64
  data        dataset; default: scenes
  scenes      easy or full, if `data` is scenes; default: easy

Every trial is a complete run with its own learning-rate schedule. `scenes` is endless, so no image
repeats. The defaults are for a CPU: small encoders, with decoders half as deep, on simple scenes of
48 pixels; the 32 trials take about an hour. Larger machines can use larger ones:

    scaling.py:sizes=Ti/16+S/16+M/16+B/16,examples=1000000+4000000+16000000,batch=1024,scenes=full

The loss of `clip` and `siglip` is evaluated in batches of 128, whatever the training batch size, so
their curves are comparable with each other, but not with those of captioners.
"""

import itertools
from collections.abc import Iterator

from cap_pretrain import config
from cap_pretrain.sweeps.settings import EASY_SCENES, FULL_SCENES, RECIPE, model
from cap_pretrain.sweeps.trials import Trial


def sweep(arg: str | None = None) -> Iterator[Trial]:
    """Yield the trials of `sizes=…,examples=…,objectives=…,rates=…,batch=…,data=…,scenes=…`."""
    args = config.arguments(
        arg,
        sizes="32x2+48x2+64x3+96x4",
        examples="16000+32000+64000+128000",
        objectives="cap+clip",
        rates="0.001",
        batch="64",
        data="scenes",
        scenes=("easy", "full"),
    )
    lists = [getattr(args, k).split("+") for k in ("objectives", "sizes", "examples", "rates")]
    scenes = EASY_SCENES if args.scenes == "easy" else FULL_SCENES
    for objective, size, examples, rate in itertools.product(*lists):
        name = f"{objective}_{size.replace('/', '-')}_{examples}"
        yield Trial(
            f"{name}_lr={rate}" if len(lists[-1]) > 1 else name,
            f"configs/pretrain.py:objective={objective},data={args.data}",
            {
                **model(size),
                "total_steps": 0,
                "total_examples": int(examples),
                "batch_size": int(args.batch),
                "optim.lr": float(rate),
                **RECIPE,
                **(scenes if args.data == "scenes" else {}),
                "evals.val.limit": 1000,
            },
        )
