"""Answers to questions: the decoder's output after the prompt, compared with references."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.data.text.tokenizers import encode_answer
from cap_pretrain.distributed import sharding
from cap_pretrain.errors import UserError
from cap_pretrain.evals.captions import Captions
from cap_pretrain.evals.perplexity import Perplexity
from cap_pretrain.evals.question_answers import QuestionAnswers
from tests.evals import stubs
from tests.layouts import on_eight_devices

KINDS = ["number", "yes/no"]
QUESTIONS = ("which is the blue shape", "is there a red circle", "what is on the left")


class Asked:
    """Questions about images of `scenes`; one of the images cannot be decoded.

    `answers` has the reference answers of some, by index.
    """

    class_names = KINDS

    def __init__(self, scenes, answers=None, broken=4):
        self._scenes, self._broken, self.answers = scenes, broken, answers or {}

    def __str__(self):
        return "dataset asked"

    def __len__(self):
        return len(self._scenes)

    def __getitem__(self, index):
        return {
            "image": b"broken" if index == self._broken else self._scenes[index]["image"],
            "question": QUESTIONS[index % 3],
            "captions": list(self.answers.get(index, [])),
            "label": index % 3 - 1,
            "id": str(100 + index),
        }


def teach(params):
    """Scale parameters so that answers depend on image and question."""
    for part in ("query", "value"):
        params["decoder"]["blocks"]["cross_attention"][part]["kernel"] *= 4
    params["decoder"]["logits"]["bias"] *= 0
    params["text_positions"] *= 5


@pytest.fixture(scope="module")
def captioner(tokenizer_path):
    context, variables = stubs.small("captioner", tokenizer_path, text__length=14)
    teach(variables[0])
    return context, variables


@pytest.fixture
def asked(captioner, monkeypatch):
    """The dataset, and a function from an evaluator and its options to its result."""
    context, variables = captioner
    asked = Asked(context.source())
    monkeypatch.setattr(type(context), "source", lambda *_: asked)
    return asked, lambda cls, **options: cls(context, cls.Options(**options))(variables)


@pytest.fixture(scope="module")
def said(captioner):
    """The answer to each question, each token from a forward pass over the text before it."""
    context, variables = captioner
    learner = nnx.merge(context.graphdef, *variables)
    predict = jax.jit(lambda image, text: learner.predict(learner.encode(image).tokens, text))
    asked, found = Asked(context.source(), broken=None), {}
    for index in range(len(asked)):
        text, given = encode_answer(context.tokenizer, asked[index]["question"], None)
        assert 3 < given <= 7
        for position in range(given, len(text)):
            logits = predict(asked[index]["image"][None], text[None])
            text[position] = np.argmax(logits[0, position])
        found[index] = context.tokenizer.decode(text[given:])
    del found[4]
    return found


def test_answers_follow_the_question_and_are_judged_by_kind(asked, said):
    source, run = asked
    assert len(set(said.values())) > 4
    # 0, 3, … have no kind, 1, 4, … are numbers, 2, 5, … yes/no; the image of 4 is broken.
    source.answers |= {k: [said[k]] * 2 + ["other"] * 8 for k in (0, 3, 6)}  # 0.6 each
    source.answers |= {k: [said[k]] * 10 for k in (1, 7)} | {10: ["other"] * 10}
    source.answers |= {2: [said[2]], 5: ["other"], 8: [said[8].upper()]}
    source.answers |= {4: ["nobody sees it"]}
    result = run(QuestionAnswers, batch_size=5, samples=3)
    kept = {str(100 + index): answer for index, answer in said.items()}
    assert {str(e["question_id"]): e["answer"] for e in result.details["answers"]} == kept
    assert all(isinstance(e["question_id"], int) for e in result.details["answers"])
    counts = [list(said.values()).count(text) for text in said.values()]
    assert result.metrics == pytest.approx(
        {
            "accuracy": (3 * 0.6 + 2 + 2) / 9,
            "accuracy_number": 2 / 3,
            "accuracy_yes_no": 2 / 3,
            "distinct_share": len(set(said.values())) / 12,
            "commonest_share": max(counts) / 12,
        }
    )
    samples = result.details["samples"]
    assert [s["id"] for s in samples] == ["100", "101", "102"]
    assert samples[0]["accuracy"] == pytest.approx(0.6) and samples[1]["accuracy"] == 1
    assert samples[2]["references"] == [said[2]] and samples[2]["question"] == QUESTIONS[2]
    about = {"dataset": "scenes", "split": "val", "questions": 12, "judged": 9}
    about |= {"judged_by_kind": {"number": 3, "yes/no": 3}}
    assert about.items() <= result.details.items()
    assert "greedy" in result.details["protocol"] and "VQA" in result.details["protocol"]
    assert result.lines[0] == f"100: {QUESTIONS[0]} {said[0]}"


def test_where_answers_are_secret_there_are_only_answers(asked, said):
    _, run = asked
    result = run(QuestionAnswers, limit=3)
    assert result.metrics.keys() == {"distinct_share", "commonest_share"}
    assert [e["answer"] for e in result.details["answers"]] == [said[k] for k in range(3)]
    assert result.details["judged"] == 0


def test_samples_of_captions_show_the_question(asked, said):
    source, run = asked
    source.answers |= {0: ["x"], 1: ["y"]}
    result = run(Captions, count=3, shown=2)
    assert [(s["question"], s["caption"]) for s in result.details["samples"]] == [
        (QUESTIONS[k], said[k]) for k in range(3)
    ]
    assert result.lines[0] == f"100: {QUESTIONS[0]} {said[0]}"


def test_perplexity_is_that_of_the_answers(captioner, asked):
    source, run = asked
    context, variables = captioner
    source.answers |= {0: ["a red circle", "blue"], 2: ["a ring"], 4: ["unseen"], 5: ["blue " * 20]}
    result = run(Perplexity, batch_size=3, pairs=6)
    learner = nnx.merge(context.graphdef, *variables)
    predict = jax.jit(
        lambda image, text: jax.nn.log_softmax(learner.predict(learner.encode(image).tokens, text))
    )
    nats, tokens, full, text = 0.0, 0, 0, ""
    for index in (0, 2, 5):
        for answer in source.answers[index]:
            ids, given = encode_answer(context.tokenizer, source[index]["question"], answer)
            log_probs = np.asarray(predict(source[index]["image"][None], ids[None]))[0]
            there = [n for n in range(given, len(ids)) if ids[n]]
            nats -= sum(float(log_probs[n, ids[n]]) for n in there)
            tokens += len(there)
            full += ids[-1] != 0
            text += context.tokenizer.decode(ids[given:])
    counts = {"tokens": tokens, "captions": 4, "captions_of_full_length": full, "bytes": len(text)}
    assert counts.items() <= result.details.items() and 0 < full < 4
    assert result.metrics["perplexity"] == pytest.approx(np.exp(nats / tokens), rel=1e-5)


def test_a_dataset_without_questions_is_refused(captioner, tokenizer_path):
    context, _ = captioner
    with pytest.raises(UserError, match="question_answers needs questions, and .* has none"):
        QuestionAnswers(context, QuestionAnswers.Options())


def measured(tokenizer_path, shape, methods, batch_size):
    """Return the metrics by each method on a mesh of this shape."""
    fields = {f"mesh__{axis}": n for axis, n in zip(("data", "fsdp", "tensor"), shape, strict=True)}
    fields |= {"data__scenes__length_val": 11, "text__length": 14}
    context, (params, stats) = stubs.small("captioner", tokenizer_path, **fields)
    teach(params)
    params = jax.device_put(params, sharding.param_shardings(params, context.mesh))
    variables = params, jax.device_put(stats, sharding.replicated(context.mesh))
    answers = {k: ["circle", "a ring", "blue"] * 3 for k in range(0, 11, 2)}
    asked = Asked(context.source(), answers)
    type(context).source, found = lambda *_: asked, []
    with jax.set_mesh(context.mesh), jax.transfer_guard("disallow"):
        for method in methods:
            options = QuestionAnswers.Options(method=method, beams=3, batch_size=batch_size)
            result = QuestionAnswers(context, options)(variables)
            assert not result.metrics.keys() & result.details.keys()
            found.append(json.loads(json.dumps(result.metrics | result.details)))
    return found


@pytest.mark.slow  # captions are decoded likewise in test_captions_devices.py
@pytest.mark.parametrize("methods", [["beam"], ["greedy", "sample"]])
def test_one_device_and_eight_answer_the_same(tokenizer_path, monkeypatch, methods):
    monkeypatch.setattr(stubs.Context, "source", stubs.Context.source)  # put back afterwards
    path = str(tokenizer_path)
    one = measured(path, (1, 1, 1), methods, 3)
    (eight,) = on_eight_devices(measured, [[path, (2, 2, 2), methods, 7]])
    assert one == eight
    assert len({e["answer"] for result in one for e in result["answers"]}) > 3
