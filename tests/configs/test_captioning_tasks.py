"""Tests of configs/coco_captioning.py with captions and questions at once."""

import json

import cv2
import numpy as np
import pytest

from cap_pretrain import inputs, train
from cap_pretrain.errors import UserError
from cap_pretrain.training import feed
from cap_pretrain.validation import validate
from tests import toy
from tests.data.test_question_formats import coco_photos, vqa_files, write_json
from tests.tools.test_build_dataset import jpeg, run, write_captions, write_files


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Return the folders of a dataset with captions and one with questions (train and val)."""
    root = tmp_path_factory.mktemp("data")
    captions, photos, questions, answers, about = [], [], [], [], []
    for split, first in (("train", 0), ("val", 20)):
        names = {n: f"{n}.jpg" for n in range(first, first + 9)}
        texts = [(n, f"a jpeg of number {n % 3}") for n in names for _ in range(2)]
        captions.append(f"{split}={write_captions(root / f'{split}.json', names, texts)}")
        files = {name: jpeg(n) for n, name in names.items()}
        photos.append(f"{split}={write_files(root / split, files)}")
        asked, answered = vqa_files(root, f"{split}2014", [*names][1:6])
        questions.append(f"{split}={asked}")
        answers.append(f"{split}={answered}")
        about.append(f"{split}={coco_photos(root, f'{split}2014', [*names][1:6])}")
    common = ("--out", root / "built")
    arguments = ("--annotations", *captions, "--images", *photos)
    assert run("captions_json", "--name", "captioned", *common, *arguments) == 0
    arguments = ("--questions", *questions, "--annotations", *answers, "--images", *about)
    assert run("vqav2", "--name", "asked", *common, *arguments) == 0
    return root / "built" / "captioned", root / "built" / "asked"


@pytest.mark.slow
def test_captions_and_questions_in_one_run(datasets, tmp_path):
    captioned, asked = datasets
    mixture = f"{captioned}:0.5+{asked}:0.5"
    c = toy.load("coco_captioning", f"data={mixture},tasks=captions+questions")
    fields = dict(data__name=mixture, optim__lr_rules=(), model__decoder_depth=1)
    fields |= dict(model__depth=1, model__width=32, model__mlp=64)
    c = toy.shrink(c, text__vocab_size=60, text__length=24, eval__every_steps=2, **fields)
    assert {"scores", "answers_2"} < {*c.evals}
    for name in ("samples", "scores", "samples_2"):  # as in tests/test_initial.py
        del c.evals[name]
    validate(c)
    train.run(c, tmp_path)

    assert [line["step"] for line in toy.losses(tmp_path)] == [1, 2]
    results = {
        name: json.loads((tmp_path / "evals" / name / "2.json").read_text()) for name in c.evals
    }
    assert results["val"]["examples"] == 9 and results["val"]["loss"] > 0
    answers = results["answers_2"]
    assert (answers["dataset"], answers["split"]) == (str(asked), "val")
    assert answers["judged_by_kind"] == {"number": 5, "other": 5, "yes/no": 5}
    assert {"accuracy", "accuracy_yes_no", "accuracy_number", "accuracy_other"} <= answers.keys()
    assert results["val_2"]["examples"] == 15 and results["val_2"]["loss"] > 0

    # The tokenizer was also trained on questions, and batches contain both datasets.
    tokenizer = inputs.open_tokenizer(c, tmp_path / inputs.TOKENIZER_FILE)
    assert 2 not in tokenizer.encode("What about 2?")
    batches = feed.training_batches(c, inputs.open_sources(c), tokenizer)
    prompts = np.concatenate([batches[step]["prompt"] for step in range(4)])
    assert np.sum(prompts > 0) == np.sum(prompts == 0) == 16


def test_tasks_are_given_once_or_for_each_dataset():
    c = toy.load("coco_captioning", "data=a+b,tasks=questions")
    names = {name: section.data for name, section in c.evals.items()}
    assert names == {
        **{"val": "", "samples": "", "answers": ""},
        **{"val_2": "b", "samples_2": "b", "answers_2": "b"},
    }
    with pytest.raises(UserError, match="tasks='captions.questions' names 2 tasks for 3 datasets"):
        toy.load("coco_captioning", "data=a+b+c,tasks=captions+questions")
    with pytest.raises(UserError, match="tasks='question' is unknown. Did you mean 'questions'"):
        toy.load("coco_captioning", "tasks=question")


COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


@pytest.mark.slow
def test_it_learns_to_answer_from_question_and_image(tmp_path):
    arguments = {"--questions": [], "--annotations": [], "--images": []}
    for split, first in (("train", 0), ("val", 60)):
        asked, given, files = [], [], {}
        for number in range(first, first + 30):
            name = [*COLORS][number % 3]
            noise = np.random.default_rng(number).integers(0, 30, (16, 16, 3))
            pixels = (np.array(COLORS[name]) + noise).astype(np.uint8)
            files[f"COCO_x_{number:012d}.png"] = cv2.imencode(".png", pixels[..., ::-1])[
                1
            ].tobytes()
            questions = {"what colour is it?": ("other", name)}
            questions |= {
                f"is it {other}?": ("yes/no", "yes" if other == name else "no") for other in COLORS
            }
            for k, (question, (kind, answer)) in enumerate(questions.items()):
                key = {"question_id": 10 * number + k, "image_id": number}
                asked.append(key | {"question": question})
                answers = [{"answer": answer, "answer_id": n} for n in range(10)]
                given.append(key | {"answer_type": kind, "answers": answers})
        path = write_json(tmp_path / f"{split}_questions.json", {"questions": asked})
        arguments["--questions"].append(f"{split}={path}")
        path = write_json(tmp_path / f"{split}_annotations.json", {"annotations": given})
        arguments["--annotations"].append(f"{split}={path}")
        arguments["--images"].append(f"{split}={write_files(tmp_path / split, files)}")
    flags = [text for flag, values in arguments.items() for text in (flag, *values)]
    assert run("vqav2", "--name", "colours", "--out", tmp_path, *flags) == 0
    c = toy.load("coco_captioning", f"data={tmp_path / 'colours'},tasks=questions")
    c = toy.shrink(c, total_steps=200, batch_size=32, data__name=str(tmp_path / "colours"))
    c.update({"optim": {"lr_rules": (), "lr": 3e-3}, "learner": {"parallel_fraction": 0.3}})
    c.text.vocab_size, c.model.decoder_depth, c.eval.every_steps = 60, 2, 200
    train.run(c, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "evals" / "answers" / "200.json").read_text())
    assert result["judged_by_kind"] == {"other": 30, "yes/no": 90}
    assert result["accuracy_other"] > 0.9 and result["accuracy_yes_no"] > 0.9
