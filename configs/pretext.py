"""Pretexts: encoders that learn from images alone.

python -m cap_pretrain.main --workdir=runs/simclr \
    --config=configs/pretext.py:task=simclr,encoder=resnet50,data=data/my_images

| task | what is learned |
|---|---|
| rotation | by which of four angles an image was turned (Gidaris et al. 2018, 1803.07728) |
| jigsaw | in which order nine tiles lie (Noroozi & Favaro 2016, 1603.09246) |
| colorization | the colours of a gray image (Zhang et al. 2016, 1603.08511) |
| simclr | which two views are of one image (Chen et al. 2020, 2002.05709) |

A `recipe` is a task's settings as published, "reference" or what else its file in
cap_pretrain/learners names. `encoder` is an architecture, its images as large as the recipe has
them. `evals` are evaluators by name, as in `evaluate.py`: loss+knn+linear_probe also judges the
encoder on the way, where there are labels.

What it learned goes on as any encoder does: `configs/linear_probe.py`, `finetune.py` on a tenth of
the labels, `recurrent.py:recipe=rotation_lstm,encoder=runs/simclr`.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners
from cap_pretrain.errors import UserError, did_you_mean


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `task=…,encoder=…,data=…,recipe=…,evals=NAME+NAME+…`.

    Raises:
      UserError: an unknown task, encoder or recipe.
    """
    tasks = learners.pretexts()
    args = config.arguments(
        arg, task=tuple(tasks), encoder="resnet50", data="scenes", recipe="", evals="loss"
    )
    recipes = tasks[args.task].RECIPES
    recipe = args.recipe or next(iter(recipes))
    if recipe not in recipes:
        raise UserError(
            f"--config: recipe={recipe!r} is none of {args.task}: {', '.join(recipes)}."
            f"{did_you_mean(recipe, recipes)}"
        )
    c = config.default()
    c.data.name = args.data
    if args.data == "scenes":  # there is no end of it, and epochs are counted
        c.data.scenes.length_train = 20_000
    c.model.name = {"vit": "S/16"}.get(args.encoder, args.encoder)
    c.learner = learners.defaults(args.task)
    c.optim.clip_norm = 0.0
    c.optim.warmup_share = 0.0
    c.update_from_flattened_dict(recipes[recipe])
    c.evals = ConfigDict({name: evals.defaults(name) for name in args.evals.split("+")})
    return c
