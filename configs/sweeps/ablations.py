"""Ablations of the captioning paper: one setting varies, everything else is equal.

python tools/sweep.py run configs/sweeps/ablations.py:what=parallel --out runs/parallel --slots 2
python tools/sweep.py table runs/parallel --figures val/loss linear_probe/top1
python tools/sweep.py plot runs/parallel --x learner.parallel_fraction --y linear_probe/top1 \
    --out parallel.png

Arguments, with lists joined by +:
  what    parallel: share of examples predicted in parallel (Tschannen et al. 2023, 2306.07915,
                    table 7): 0+0.25+0.5+0.75+1
          depth:    layers of the decoder: 1+2+3+6
          width:    width of the decoder: 48+96+192
          tokens:   share of patch tokens that reach the encoder in training: 0.25+0.35+0.5+0.75+1
          read:     share of patch tokens that the decoder reads in training; the same values
          patch:    side of a patch in pixels, which must divide data.image_size: 6+8+12+16+24
          default: parallel
  values  other values than these
  seeds   default: 0+1
  steps   default: 1500
  size    encoder as WIDTHxDEPTH with 12-pixel patches, or a named size; default: 96x3
  data    dataset; default: scenes, simple ones of 48 pixels
  evals   evaluators at the end; default: linear_probe+composition

For a dataset of photographs:

    ablations.py:what=read,data=data/flickr8k,size=S/16,steps=20000,evals=retrieval -- \
        --config.data.image_size=112 --config.batch_size=256
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from cap_pretrain import config
from cap_pretrain.sweeps.settings import EASY_SCENES, RECIPE, model, values
from cap_pretrain.sweeps.trials import Trial

Fields = dict[str, Any]
Kind = type[int] | type[float]

WHAT: dict[str, tuple[str, Kind, Callable[[Any, str], Fields]]] = {
    "parallel": ("0+0.25+0.5+0.75+1", float, lambda v, _: {"learner.parallel_fraction": v}),
    "depth": ("1+2+3+6", int, lambda v, _: {"model.decoder_depth": v}),
    # An MLP of four times the width; heads of 16, as `settings.model` has them, or one.
    "width": (
        "48+96+192",
        int,
        lambda v, _: {
            "model.decoder_width": v,
            "model.decoder_mlp": 4 * v,
            "model.decoder_heads": 1 if v % 16 else v // 16,
        },
    ),
    "tokens": ("0.25+0.35+0.5+0.75+1", float, lambda v, _: _kept(v, "encoder")),
    "read": ("0.25+0.35+0.5+0.75+1", float, lambda v, _: _kept(v, "decoder")),
    "patch": ("6+8+12+16+24", int, lambda v, name: {"model.name": f"{name.partition('/')[0]}/{v}"}),
}
"""The values of each setting, and the fields that follow from a value and `model.name`."""


def _kept(share: float, place: str) -> Fields:
    return {"model.keep_tokens": share, "model.keep_tokens_at": place}


def sweep(arg: str | None = None) -> Iterator[Trial]:
    """Yield the trials of `what=…,values=…,seeds=…,steps=…,size=…,data=…,evals=…`."""
    args = config.arguments(
        arg,
        what=tuple(WHAT),
        values="",
        seeds="0+1",
        steps="1500",
        size="96x3",
        data="scenes",
        evals="linear_probe+composition",
    )
    usual, kind, fields = WHAT[args.what]
    drawn = {**EASY_SCENES, "data.scenes.length_train": 20_000}
    size = model(args.size)
    (steps,) = values("steps", args.steps, int)
    pairs = itertools.product(
        values("values", args.values or usual, kind), values("seeds", args.seeds, int)
    )
    for value, seed in pairs:
        yield Trial(
            f"{args.what}={value:g}_seed={seed}",
            f"configs/pretrain.py:objective=cappa,data={args.data},evals={args.evals}",
            {
                **size,
                "total_steps": steps,
                "batch_size": 64,
                "optim.lr": 1e-3,
                **RECIPE,
                **(drawn if args.data == "scenes" else {}),
                "seed": seed,
                **fields(value, size["model.name"]),
            },
        )
