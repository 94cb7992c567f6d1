"""Tests of every config in `configs/`: its resolved fields, and that it trains.

`pytest tests/configs/test_golden_configs.py --update_golden` rewrites tests/golden/; the diff then
shows every changed hyperparameter.
"""

import difflib
import json
from pathlib import Path

import pytest

from cap_pretrain import config as configs
from cap_pretrain import learners, train
from cap_pretrain.validation import validate
from tests import toy

GOLDEN = Path(__file__).parents[1] / "golden"
JOINT = ("cap+siglip", "cap+siglip+distill+masked")
# Every file of configs/, with every value of the arguments that choose the training objective.
CASES = {
    "quickstart": ("quickstart", None),
    **{
        f"pretrain-{objective}": ("pretrain", f"objective={objective}")
        for objective in ("cappa", "cap", "locca", "clip", "siglip", "aimv2", "coca", *JOINT)
    },
}

# By default a captioner is trained. The slow tests train the others: CapPa here, pretrain-clip in
# checkpoints/test_warm_start.py, and all of pretrain on one and two hosts in
# distributed/test_multihost.py.
TRAINED = ("quickstart", pytest.param("pretrain-cappa", marks=pytest.mark.slow))

# Configs initialized from an encoder.
WITH_ENCODER = {
    "evaluate": ("evaluate", "evals=loss+captions"),
    "continue_training": ("continue_training", None),
    "coco_captioning": ("coco_captioning", None),
    "coco_captioning-questions": (
        "coco_captioning",
        "data=data/coco:0.5+data/vqav2:0.5,tasks=captions+questions",
    ),
    "referring": ("referring", None),
    "linear_probe": ("linear_probe", None),
    "linear_probe-sgd": ("linear_probe", "protocol=sgd"),
    "finetune": ("finetune", "fraction=0.1"),
    "finetune-map": ("finetune", "head=map"),
    "lit": ("lit", "encoder=runs/cappa,data=data/coco,zero_shot=data/imagenette"),
    "lit-stored": ("lit", "encoder=stored,data=data/features,contrast=sigmoid,head=none"),
}

# Trained in test_recurrent_recipes.py.
RECURRENT = {
    f"recurrent-{recipe}": ("recurrent", f"recipe={recipe}")
    for recipe in (
        *("cnn_lstm", "gru", "show_attend_tell", "merge", "merge_jigsaw", "rotation_lstm"),
        *("clip_lstm", "clip_attention"),
    )
}
# Golden files keep the former names of recipes, so these are tested, too.
FORMER_NAMES = {recipe: alias for alias, recipe in learners.RECIPE_ALIASES.items()}
# Trained in test_pretext_recipes.py.
PRETEXT = {
    f"pretext-{task}-{recipe}": ("pretext", f"task={task},recipe={recipe}")
    for task, cls in learners.pretexts().items()
    for recipe in map(FORMER_NAMES.get, cls.RECIPES, cls.RECIPES)
}
# Trained in tests/commands/test_own_data.py, validated in tests/small/test_rules.py.
SMALL = {
    "small-cap": ("small", "devices=cpu-2"),
    "small-clip": ("small", "objective=clip,devices=gpu-1"),
}
ALL = CASES | SMALL | WITH_ENCODER | RECURRENT | PRETEXT


def test_every_config_has_a_case():
    files = {name for name, _ in ALL.values()}
    assert files == {p.stem for p in toy.CONFIGS.glob("*.py")}


@pytest.mark.parametrize("case", ALL)
def test_resolves_to_the_golden_config(case, request):
    resolved = configs.to_json(toy.load(*ALL[case]))
    path = GOLDEN / f"{case}.json"
    if request.config.getoption("update_golden"):
        path.write_text(resolved)
    golden = path.read_text()
    difference = difflib.unified_diff(golden.splitlines(), resolved.splitlines(), lineterm="", n=0)
    assert golden == resolved, "\n".join(difference)


@pytest.mark.parametrize("case", [*CASES, *RECURRENT, *PRETEXT])
def test_is_valid_and_locked(case):
    c = toy.load(*ALL[case])
    validate(c)
    assert c.is_locked
    for section in (c, c.optim, c.learner, *c.evals.values()):
        with pytest.raises(AttributeError):
            section.no_such_field = 1


def test_only_the_objective_differs():
    def rest(objective):
        c = toy.load("pretrain", f"objective={objective}").to_dict()
        del c["learner"], c["evals"]
        return c

    assert rest("cappa") == rest("cap") == rest("locca") == rest("clip") == rest("siglip")


@pytest.mark.parametrize("case", TRAINED)
def test_trains_two_steps_and_writes_its_files(case, tokenizer_path, tmp_path):
    c = toy.shrink(toy.load(*CASES[case]), optim__warmup_share=0.0)
    if case != "quickstart":  # quickstart trains its own tokenizer
        c.text.tokenizer = str(tokenizer_path)
    for section in c.evals.values():
        if section.evaluator == "loss":
            section.limit = section.batch_size = 8
        else:
            section.count = 8
        if section.evaluator == "scene_captions":
            section.batch_size = 8
    validate(c)
    train.run(c, tmp_path)

    c.data.order = "global"  # what "auto" is for scenes
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(configs.to_json(c))
    assert (tmp_path / "tokenizer" / "tokenizer.model").is_file()
    assert (tmp_path / "checkpoints" / "2").is_dir()
    assert list((tmp_path / "tensorboard").iterdir())
    losses = toy.losses(tmp_path)
    assert [line["step"] for line in losses] == [1, 2]
    assert losses[0]["train/loss"] != losses[1]["train/loss"]
    last = {k: v for line in toy.lines(tmp_path) if line["step"] == 2 for k, v in line.items()}
    for name in c.evals:
        result = json.loads((tmp_path / "evals" / name / "2.json").read_text())
        assert result["step"] == 2 and result["options"] == c.evals[name].to_dict()
        logged = {k.split("/", 1)[1]: v for k, v in last.items() if k.startswith(f"{name}/")}
        assert logged and logged.items() <= result.items()
