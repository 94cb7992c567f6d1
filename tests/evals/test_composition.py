"""Composition: oracles, guessers, and learners compared with scoring each pair on its own."""

import json

import numpy as np
import pytest

from cap_pretrain.data.hard_negatives import OrderQuestions, Question, SceneQuestions
from cap_pretrain.errors import UserError
from cap_pretrain.evals import composition
from cap_pretrain.evals.composition import Composition
from cap_pretrain.evals.retrieval import Retrieval
from cap_pretrain.evals.zero_shot import ZeroShot
from tests import tiny
from tests.evals import stubs


class Asked:
    """Questions: image k has one of two kinds, every third image a second one, and image 4 none."""

    protocol = "numbers"

    def __init__(self, broken=()):
        self.source = stubs.Pictures([[]] * 8, broken=broken)

    def questions(self, index):
        first = Question(f"{index}", {"next": f"{index + 1}", "last": f"{index + 9}"})
        second = Question(f"{index} 5", {"next": f"{index + 1} 5"})
        return [] if index == 4 else [first, second] if index % 3 == 0 else [first]


@pytest.fixture
def measured(monkeypatch):
    def measure(learner, broken=(), **options):
        monkeypatch.setattr(composition, "question_set", lambda *_: Asked(broken))
        context, variables = stubs.context(learner, None)
        return Composition(context, Composition.Options(**options))(variables)

    return measure


def test_an_oracle_is_always_right_and_a_constant_guesses(measured):
    result = measured(stubs.Oracle, batch_size=1)
    assert result.details["images"] == 7  # one has no question
    assert result.metrics.pop("chance_all") == pytest.approx((7 / 3 + 3 / 2) / 10)
    assert result.metrics == dict.fromkeys(
        ("accuracy", "accuracy_next", "accuracy_last", "accuracy_all"), 1.0
    )
    assert result.details["questions"] == 10
    assert result.details["questions_by_kind"] == {"last": 7, "next": 10}
    metrics = measured(stubs.Constant, batch_size=8).metrics
    assert metrics["accuracy"] == metrics["accuracy_next"] == metrics["accuracy_last"] == 0.5
    assert metrics["accuracy_all"] == pytest.approx(metrics["chance_all"])
    metrics = measured(stubs.Diverged).metrics
    assert metrics["accuracy"] == metrics["accuracy_all"] == 0


def test_broken_images_are_not_asked_about(measured):
    assert measured(stubs.Constant, broken=[0], batch_size=3).details["questions"] == 8
    assert measured(stubs.Constant, limit=4, batch_size=3).details["questions"] == 6


@pytest.fixture(scope="module")
def small(tokenizer_path):
    """Contexts and variables of learners with random weights, by kind."""
    return {kind: stubs.small(kind, tokenizer_path) for kind in ("captioner", "dual_encoder")}


@pytest.mark.parametrize(
    ("questions", "cls"), [("scenes", SceneQuestions), ("order", OrderQuestions)]
)
@pytest.mark.parametrize("kind", ["captioner", "dual_encoder"])
def test_accuracy_is_that_of_scoring_one_by_one(small, kind, questions, cls):
    context, variables = small[kind]
    options = Composition.Options(questions=questions, batch_size=5, pairs=40)
    metrics = Composition(context, options)(variables).metrics
    score = tiny.jitted((context.graphdef, *variables), lambda x, i, t: x.score(i, t))
    asked = cls(context.source())
    blank = np.full((16, 16, 3), 128, np.uint8)
    outcome = {}
    for index in range(13):
        image = asked.source[index]["image"]
        for question in asked.questions(index):
            texts = [question.true, *question.false.values()]
            texts = np.stack([context.tokenizer.encode(text) for text in texts])
            padded = np.pad(texts, ((0, 6 - len(texts)), (0, 0)))
            scores, blind = np.asarray(score(np.stack([image, blank]), np.stack([padded] * 2)))
            rules = {"accuracy": scores, "over_prior": scores - blind, "blind": blind}
            for rule, found in rules.items():
                ahead = found[0] - found[1 : len(texts)]
                tied = np.abs(ahead) < 1e-5  # long captions are truncated
                one_by_one = np.where(tied, 0.5, ahead > 0)
                of_all = np.all(tied | (ahead > 0)) / (1 + tied.sum())
                outcome.setdefault(f"{rule}_all", []).append(of_all)
                for name, value in zip(question.false, one_by_one, strict=True):
                    outcome.setdefault(f"{rule}_{name}", []).append(value)
    expected = {name: np.mean(values) for name, values in outcome.items()}
    if kind == "dual_encoder":  # it has no score without an image
        expected = {name: x for name, x in expected.items() if name.startswith("accuracy")}
    rules = {name.removesuffix("_all") for name in expected if name.endswith("_all")}
    for rule in rules:
        kinds = [
            x
            for name, x in expected.items()
            if name.startswith(f"{rule}_") and name != f"{rule}_all"
        ]
        expected[rule] = np.mean(kinds)
    chance = metrics.pop("chance_all")
    assert 0.2 <= chance < 0.4 and metrics == pytest.approx(expected)


def test_sugarcrepe_files_are_evaluated(small, tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for k in range(3):
        image = np.full((20, 30, 3), 80 * k, np.uint8)
        Image.fromarray(image).save(tmp_path / "images" / f"{k:012}.jpg")
    for file, count in (("swap_obj", 3), ("add_att", 2)):
        entries = {
            str(k): {
                "filename": f"{k:012}.jpg",
                "caption": f"a red circle and a {file}",
                "negative_caption": "a blue circle" if k else f"a red circle and a {file}",
            }
            for k in range(count)
        }
        (tmp_path / f"{file}.json").write_text(json.dumps(entries))
    context, variables = small["captioner"]
    options = Composition.Options(
        questions="sugarcrepe", annotations=str(tmp_path), images=str(tmp_path / "images")
    )
    result = Composition(context, options)(variables)
    assert result.details["questions_by_kind"] == {"add_att": 2, "swap_obj": 3}
    metrics = result.metrics
    assert metrics["accuracy"] == pytest.approx(
        (metrics["accuracy_add_att"] + metrics["accuracy_swap_obj"]) / 2
    )
    assert metrics["accuracy_add_att"] in (0.25, 0.75)  # one tie, with itself
    assert "accuracy_all" not in metrics and "blind_swap_obj" in metrics


def test_questions_are_about_the_runs_own_data(small):
    drawn, _ = small["captioner"]
    assert isinstance(composition.question_set(drawn, Composition.Options()), SceneQuestions)
    own, _ = stubs.context(stubs.Oracle, stubs.Pictures([["a dog in red"]]))
    assert isinstance(composition.question_set(own, Composition.Options()), OrderQuestions)


def test_mistakes_are_the_users(small):
    with pytest.raises(UserError, match="no set 'scene'. Did you mean 'scenes'?"):
        Composition.Options(questions="scene")
    captions = [["dog"], []]
    context, _ = stubs.context(stubs.Oracle, stubs.Pictures(captions))
    with pytest.raises(UserError, match="pictures yields no questions"):
        Composition(context, Composition.Options(questions="order"))


def test_learners_that_score_no_text_are_refused():
    class Rotation(stubs.nnx.Module):
        pass

    context, _ = stubs.context(Rotation, stubs.Pictures([["1"]]))
    for cls in (Composition, Retrieval, ZeroShot):
        with pytest.raises(UserError, match="which a Rotation cannot"):
            cls(context, cls.Options())
