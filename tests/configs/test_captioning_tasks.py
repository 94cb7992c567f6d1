"""configs/coco_captioning.py with captions and questions at once."""

import json

import numpy as np
import pytest

from cap_pretrain import config as configs
from cap_pretrain import inputs, train
from cap_pretrain.errors import UserError
from tests import toy
from tests.data.test_question_formats import coco_photos, vqa_files
from tests.tools.test_build_dataset import jpeg, run, write_captions, write_files


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Folders of a dataset of captions and one of questions, with the splits train and val."""
    root = tmp_path_factory.mktemp("data")
    captions, photos, questions, answers, about = [], [], [], [], []
    for split, first in (("train", 0), ("val", 20)):
        names = {n: f"{n}.jpg" for n in range(first, first + 9)}
        told = [(n, f"a jpeg of number {n % 3}") for n in names for _ in range(2)]
        captions.append(f"{split}={write_captions(root / f'{split}.json', names, told)}")
        files = {name: jpeg(n) for n, name in names.items()}
        photos.append(f"{split}={write_files(root / split, files)}")
        asked, answered = vqa_files(root, f"{split}2014", [*names][1:6])
        questions.append(f"{split}={asked}")
        answers.append(f"{split}={answered}")
        about.append(f"{split}={coco_photos(root, f'{split}2014', [*names][1:6])}")
    common = ("--out", root / "built")
    told = ("--annotations", *captions, "--images", *photos)
    assert run("captions_json", "--name", "told", *common, *told) == 0
    asked = ("--questions", *questions, "--annotations", *answers, "--images", *about)
    assert run("vqav2", "--name", "asked", *common, *asked) == 0
    return root / "built" / "told", root / "built" / "asked"


def test_captions_and_questions_in_one_run(datasets, tmp_path):
    told, asked = datasets
    mixture = f"{told}:0.5+{asked}:0.5"
    c = toy.load("coco_captioning", f"data={mixture},tasks=captions+questions")
    fields = dict(data__name=mixture, optim__lr_rules=(), model__decoder_depth=1)
    c = toy.shrink(c, text__vocab_size=60, text__length=24, eval__every_steps=2, **fields)
    configs.validate(c)
    train.run(c, tmp_path)

    assert [line["step"] for line in toy.losses(tmp_path)] == [1, 2]
    results = {
        name: json.loads((tmp_path / "evals" / name / "2.json").read_text()) for name in c.evals
    }
    assert results["scores"]["dataset"] == str(told)
    assert results["scores"]["options"]["evaluator"] == "caption_scores"
    answers = results["answers_2"]
    assert (answers["dataset"], answers["split"]) == (str(asked), "val")
    assert answers["judged_by_kind"] == {"number": 5, "other": 5, "yes/no": 5}
    assert {"accuracy", "accuracy_yes_no", "accuracy_number", "accuracy_other"} <= answers.keys()
    assert "question" in results["samples_2"]["samples"][0]
    assert results["val_2"]["examples"] == 15 and results["val_2"]["loss"] > 0

    # The tokenizer was trained on questions, too, and batches are of both.
    tokenizer = inputs.open_tokenizer(c, tmp_path / inputs.TOKENIZER_FILE)
    assert 2 not in tokenizer.encode("What about 2?")
    batches = inputs.training_batches(c, inputs.open_sources(c), tokenizer)
    prompts = np.concatenate([batches[step]["prompt"] for step in range(4)])
    assert np.sum(prompts > 0) == np.sum(prompts == 0) == 16


def test_tasks_are_one_for_all_or_one_for_each():
    c = toy.load("coco_captioning", "data=a+b,tasks=questions")
    names = {name: section.data for name, section in c.evals.items()}
    assert names == {
        **{"val": "", "samples": "", "answers": ""},
        **{"val_2": "b", "samples_2": "b", "answers_2": "b"},
    }
    with pytest.raises(UserError, match="tasks='captions.questions' are 2 of 3 datasets"):
        toy.load("coco_captioning", "data=a+b+c,tasks=captions+questions")
    with pytest.raises(UserError, match="tasks='question' is unknown. Did you mean 'questions'"):
        toy.load("coco_captioning", "tasks=question")
