"""Train a transformer decoder to caption images from the tokens of a frozen encoder.

python -m cap_pretrain.main --config=configs/coco_captioning.py:data=data/coco \
    --workdir=runs/captioning --config.encoder=runs/cappa

Arguments:
  data   dataset, or a mixture with weights such as A:0.7+B:0.3; default: coco_captions
  tasks  captions (scored with COCO's metrics) or questions (scored with VQA accuracy): one for all
         datasets, or one for each in their order, joined by +; default: captions

With several datasets, evaluators of the second one are called `val_2`, `samples_2`, `answers_2`:

    data=data/coco:0.5+data/vqav2:0.3+data/gqa:0.2,tasks=captions+questions+questions

The decoder has 12 layers of the encoder's width, as for size B in the paper (Tschannen et al. 2023,
section 4.1); `--config.model.decoder_depth` changes this. `decoder_width=768`, `decoder_mlp=3072`
and `decoder_heads=12` give a decoder of size B for any encoder. `--config.optim.lr_rules=()` trains
the encoder too, and "(('encoder/.*', 0.1),)" does so at a tenth of the learning rate.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners
from cap_pretrain.data.sources.base import parse_mixture
from cap_pretrain.errors import UserError, did_you_mean

METRICS = {"captions": ("scores", "caption_scores"), "questions": ("answers", "question_answers")}
"""Key and name of the evaluator that scores a task at the end of the run."""


def get_config(arg: str | None = None) -> ConfigDict:
    """Return the config for `data=…,tasks=…` (see the module's docstring)."""
    args = config.arguments(arg, data="coco_captions", tasks="captions")
    c = config.default()
    c.total_epochs = 10.0
    c.batch_size = 256
    c.model.decoder_depth = 12
    c.learner = learners.defaults("captioner", parallel_fraction=0.0)
    c.data.name = args.data
    c.optim.lr_rules = (("encoder/.*", 0.0),)
    c.optim.warmup_share = 0.05
    c.evals = ConfigDict()
    for number, (name, task) in enumerate(_tasks(args.data, args.tasks)):
        score_key, evaluator = METRICS[task]
        sections = {
            "val": evals.defaults("loss", unigram=not number),
            "samples": evals.defaults("captions"),
            score_key: evals.defaults(evaluator, when="end"),
        }
        for key, section in sections.items():
            section.data = name if number else ""
            c.evals[f"{key}_{number + 1}" if number else key] = section
    return c


def _tasks(data: str, text: str) -> list[tuple[str, str]]:
    """Return the datasets of a mixture with their tasks."""
    names, tasks = [name for name, _ in parse_mixture(data)], text.split("+")
    for task in tasks:
        if task not in METRICS:
            raise UserError(f"--config: tasks={task!r} is unknown.{did_you_mean(task, METRICS)}")
    tasks *= len(names) if len(tasks) == 1 else 1
    if len(tasks) != len(names):
        raise UserError(
            f"--config: tasks={text!r} names {len(tasks)} tasks for {len(names)} datasets; give "
            "one for all or one for each."
        )
    return list(zip(names, tasks, strict=True))
