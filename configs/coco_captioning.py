"""Captioning with a frozen encoder: a transformer decoder learns to caption from its tokens.

python -m cap_pretrain.main --config=configs/coco_captioning.py:data=data/coco \
    --workdir=runs/captioning --config.encoder=runs/cappa

The decoder has 12 layers of the encoder's width, as the paper's for B (Tschannen et al. 2023,
section 4.1); `--config.model.decoder_depth` changes that, and with `decoder_width=768`,
`decoder_mlp=3072` and `decoder_heads=12` it is of size B for any encoder. Encoder and decoder learn
together with `--config.optim.lr_rules=()`, or the encoder at a tenth of the rate with
"(('encoder/.*', 0.1),)".

`tasks` says how what is learned is judged: captions by the metrics of COCO, answers to questions by
that of VQA. With several datasets at once it is one for all, or one for each in their order:

    data=data/coco:0.5+data/vqav2:0.3+data/gqa:0.2,tasks=captions+questions+questions

Evaluators of the second dataset are then called `val_2`, `samples_2`, `answers_2`.
"""

from ml_collections import ConfigDict

from cap_pretrain import config, evals, learners
from cap_pretrain.data.sources.base import parse_mixture
from cap_pretrain.errors import UserError, did_you_mean

# What judges a task at the end of the run, under which name.
JUDGES = {"captions": ("scores", "caption_scores"), "questions": ("answers", "question_answers")}


def get_config(arg: str | None = None) -> ConfigDict:
    """Returns the configuration for `data=…`, captioned datasets, and their `tasks`.

    Raises:
      UserError: an unknown task, or not as many as datasets.
    """
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
        called, judge = JUDGES[task]
        judges = {
            "val": evals.defaults("loss", unigram=not number),
            "samples": evals.defaults("captions"),
            called: evals.defaults(judge, when="end"),
        }
        for key, section in judges.items():
            section.data = name if number else ""
            c.evals[f"{key}_{number + 1}" if number else key] = section
    return c


def _tasks(data: str, text: str) -> list[tuple[str, str]]:
    """Returns the datasets of a mixture with their tasks."""
    names, tasks = [name for name, _ in parse_mixture(data)], text.split("+")
    for task in tasks:
        if task not in JUDGES:
            raise UserError(f"--config: tasks={task!r} is unknown.{did_you_mean(task, JUDGES)}")
    tasks *= len(names) if len(tasks) == 1 else 1
    if len(tasks) != len(names):
        raise UserError(
            f"--config: tasks={text!r} are {len(tasks)} of {len(names)} datasets; give one for all "
            "or one for each."
        )
    return list(zip(names, tasks, strict=True))
