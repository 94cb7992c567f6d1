"""Sweep over batch size, learning rate and LSTM layers of a recurrent captioner (full grid).

python tools/sweep.py run configs/sweeps/recurrent.py:data=data/vizwiz --out runs/recurrent_sweep
python tools/sweep.py table runs/recurrent_sweep --figures val/loss:min scores/CIDEr:max \
    --pivot optim.lr learner.layers

Arguments, with lists joined by +:
  data     dataset; default: scenes
  recipe   recipe of configs/recurrent.py; default: cnn_lstm
  batches  batch sizes; default: 32+64+128+256+512
  rates    learning rates; default: 0.001+0.005+0.01+0.05
  layers   numbers of LSTM layers; default: 1+2+3+4+5
  epochs   epochs over the images; default: 5
  size     full, or toy for a small network on simple scenes on a CPU; default: full

The defaults are the values that the authors of `cnn_lstm` tried on VizWiz for one epoch each. They
varied one at a time: `rates=0.001,layers=1` is their first table, and so on.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from cap_pretrain import config
from cap_pretrain.sweeps.trials import Trial

TOY: dict[str, Any] = {
    "model.name": "mu/8",
    "learner.embed": 32,
    "learner.hidden": 32,
    "data.image_size": 32,
    "data.scenes.length_train": 2000,
    "data.scenes.length_val": 200,
    "data.scenes.max_objects": 1,
    "data.scenes.patterns": False,
    "data.scenes.backgrounds": False,
    "data.scenes.plain_captions": True,
    "data.scenes.synonyms": False,
    "text.length": 12,
    "eval.every_epochs": 0.0,
    "eval.every_share": 0.5,
    "checkpoint.every_epochs": 0.0,
    "checkpoint.every_share": 0.5,
    "checkpoint.best": "",
    "evals.scores.tokenizer": "python",
    "evals.scores.when": "end",
    "evals.samples.when": "end",
    "log.every_steps": 5,
}


def sweep(arg: str | None = None) -> Iterator[Trial]:
    """Yield the trials of `data=…,recipe=…,batches=…,rates=…,layers=…,epochs=…,size=full|toy`."""
    args = config.arguments(
        arg,
        data="scenes",
        recipe="cnn_lstm",
        batches="32+64+128+256+512",
        rates="0.001+0.005+0.01+0.05",
        layers="1+2+3+4+5",
        epochs="5",  # one epoch of the authors: each image once per caption, of which there are 5
        size=("full", "toy"),
    )
    values = zip(("batches", "rates", "layers"), (int, float, int), strict=True)
    lists = [[kind(v) for v in getattr(args, name).split("+")] for name, kind in values]
    for batch, rate, layers in itertools.product(*lists):
        yield Trial(
            f"batch={batch}_lr={rate:g}_layers={layers}",
            f"configs/recurrent.py:recipe={args.recipe},data={args.data}",
            {
                "batch_size": batch,
                "optim.lr": rate,
                "learner.layers": layers,
                "total_epochs": float(args.epochs),
                **(TOY if args.size == "toy" else {}),
            },
        )
