"""Pretrain an encoder on images alone with a pretext task.

python -m cap_pretrain.main --workdir=runs/simclr \
    --config=configs/pretext.py:task=simclr,encoder=resnet50,data=data/my_images

| task | prediction |
|---|---|
| rotation | by which of four angles an image was rotated (Gidaris et al. 2018, 1803.07728) |
| jigsaw | the order of nine tiles (Noroozi & Favaro 2016, 1603.09246) |
| colorization | the colors of a gray image (Zhang et al. 2016, 1603.08511) |
| simclr | which two views show the same image (Chen et al. 2020, 2002.05709) |

Arguments:
  task     one of the tasks above; default: rotation
  encoder  architecture of the encoder; default: resnet50. The recipe sets the image size.
  data     dataset; default: scenes
  recipe   a published set of hyperparameters of the task, from RECIPES of its learner in
           cap_pretrain/learners; default: the first
  evals    names of evaluators, joined by +; default: loss. loss+knn+linear_probe also evaluates
           the encoder during training, on data with labels.

Other configs take the encoder: `linear_probe.py`, `finetune.py` on a tenth of the labels,
`recurrent.py:recipe=rotation_lstm,encoder=runs/simclr`.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners
from cap_pretrain.errors import UserError, did_you_mean


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `task=…,encoder=…,data=…,recipe=…,evals=NAME+NAME+…`."""
    tasks = learners.pretexts()
    args = config.arguments(
        arg, task=tuple(tasks), encoder="resnet50", data="scenes", recipe="", evals="loss"
    )
    recipes = tasks[args.task].RECIPES
    recipe = learners.RECIPE_ALIASES.get(args.recipe, args.recipe) or next(iter(recipes))
    if recipe not in recipes:
        raise UserError(
            f"--config: recipe={recipe!r} is not a recipe of {args.task}: {', '.join(recipes)}."
            f"{did_you_mean(recipe, recipes)}"
        )
    c = config.default()
    c.data.name = args.data
    if args.data == "scenes":  # it is endless, but the recipes count epochs
        c.data.scenes.length_train = 20_000
    c.model.name = {"vit": "S/16"}.get(args.encoder, args.encoder)
    c.learner = learners.defaults(args.task)
    c.optim.clip_norm = 0.0
    c.optim.warmup_share = 0.0
    c.update_from_flattened_dict(recipes[recipe])
    c.evals = ConfigDict({name: evals.defaults(name) for name in args.evals.split("+")})
    return c
