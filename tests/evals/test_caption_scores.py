"""Captions of a split and their scores: the same on every host, and recorded with references."""

import json
from types import SimpleNamespace

import jax
import pytest

from cap_pretrain import evals
from cap_pretrain.commands import score_captions
from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.errors import UserError
from cap_pretrain.evals import base, caption_scores
from cap_pretrain.evals.base import Interrupted
from cap_pretrain.evals.caption_scores import CaptionScores
from cap_pretrain.evals.inference.captioning import Caption
from cap_pretrain.evals.suite import write_result
from tests import tiny, toy
from tests.evals.test_caption_metrics import CAPTIONS, PUBLISHED, REFERENCES
from tests.evals.test_loss import context_of
from tests.layouts import begun_on_eight_devices


@pytest.fixture(autouse=True)
def no_java(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")


class Context:
    """Images "a" and "b" of a dataset of three; the last cannot be decoded."""

    def __init__(self, references=REFERENCES):
        self.examples = [{"id": i, "captions": list(texts)} for i, texts in references.items()]
        self.examples.append({"id": "broken", "captions": ["never seen"]})
        self.config = SimpleNamespace(data=SimpleNamespace(name="mine:0.5+more", eval_split="val"))
        self.stopped = False

    def source(self, split, data):
        return self.examples

    def stop(self):
        return self.stopped


@pytest.fixture
def evaluator(monkeypatch):
    """Return a function that makes an evaluator of given captions."""

    def make(captions=CAPTIONS, context=None, **options):
        class Captioning:
            def __init__(self, context, source, *, batch_size, limit, how, part):
                assert limit is None and how.rows == options.get("beams", 1)

            def scored(self, variables):
                for index, text in enumerate(captions.values()):
                    yield index, [Caption(text, -1.0, 3)]

            def recorded(self, captions):
                return {}

        monkeypatch.setattr(caption_scores, "Captioning", Captioning)
        return CaptionScores(context or Context(), CaptionScores.Options(**options))

    return make


def test_captions_are_scored_and_kept(evaluator, tmp_path, capsys):
    result = evaluator()(None)
    expected = {name: value for name, value in PUBLISHED.items() if name != "METEOR"}
    found = {name: value for name, value in result.metrics.items() if name in expected}
    assert found == pytest.approx(expected, abs=1e-6)
    assert result.metrics["distinct_share"] == 1 and result.metrics["commonest_share"] == 0.5
    assert result.metrics["mean_words"] == 10
    details = result.details
    assert (details["dataset"], details["split"]) == ("mine", "val")
    assert (details["images"], details["references"]) == (2, 4)
    assert details["tokenizer"] == "Python (not PTB)"
    assert details["protocol"] == "greedy decoding; COCO evaluation by pycocoevalcap 1.2"
    assert details["skipped"]["SPICE"] == "not asked for"
    assert result.lines[0].startswith(
        "2 images of mine val, words by Python (not PTB); PTB skipped"
    )

    path = tmp_path / "evals" / "test" / "1.json"
    write_result(path, evals.defaults("caption_scores"), 1, result)
    assert score_captions.main(["--results", str(path)]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: again[name] for name in expected} == found


def test_captioners_that_say_the_same_always_are_seen_through(evaluator):
    result = evaluator({"a": "a dog", "b": "a dog"}, method="beam", beams=3)(None)
    assert result.details["protocol"].startswith("beam search, 3 beams")
    assert result.metrics["distinct_share"] == 0.5 and result.metrics["commonest_share"] == 1
    assert result.details["commonest"] == "a dog"


def test_mistakes(evaluator):
    with pytest.raises(UserError, match="needs reference captions, and mine has none"):
        evaluator(context=Context({"a": []}))
    with pytest.raises(UserError, match="image 'b' of mine has no reference captions"):
        evaluator(context=Context({"a": ["x"], "b": []}))(None)
    with pytest.raises(UserError, match="spice: there is no 'si'"):
        evaluator(spice="si")
    with pytest.raises(UserError, match="tokenizer: 'ptb' cannot run, there is no java"):
        evaluator(tokenizer="ptb")(None)


def test_a_run_that_is_to_stop_does_not_wait_for_the_scores(evaluator):
    context = Context()
    evaluate = evaluator(context=context)
    context.stopped = True
    with pytest.raises(Interrupted):
        evaluate(None)


def of_a_captioner(tokenizer_path, batch_size, **how):
    """Return the result for a learner on all devices."""
    c = toy.config(model__depth=1, data__scenes__length_val=13, text__length=8)
    c.mesh.data, c.mesh.fsdp = -1, min(2, len(jax.devices()))
    context, variables = context_of(c, tokenizer_path)
    options = CaptionScores.Options(batch_size=batch_size, **how)
    with jax.transfer_guard_host_to_device("disallow"):
        return CaptionScores(context, options)(variables)


@pytest.mark.slow
def test_a_captioner_is_scored_alike_whatever_the_batch_size(tokenizer_path):
    one, other = (of_a_captioner(tokenizer_path, batch_size) for batch_size in (5, 13))
    assert one == other
    assert one.details["images"] == 13
    captions = one.details["captions"]
    source = Scenes("val", 16, **toy.config(data__scenes__length_val=13).data.scenes)
    assert [entry["image_id"] for entry in captions] == [source[i]["id"] for i in range(13)]
    assert [entry["references"] for entry in captions] == [source[i]["captions"] for i in range(13)]


def scored(tokenizer_path, batch_size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")  # in the process with eight devices, too
        result = of_a_captioner(tokenizer_path, batch_size, method="beam", beams=2)
    return json.loads(json.dumps([result.metrics, result.details]))


@pytest.mark.slow
def test_a_captioner_is_scored_alike_on_eight_devices(tokenizer_path):
    eight = begun_on_eight_devices(scored, [(str(tokenizer_path), 5)])
    assert eight() == [scored(str(tokenizer_path), 3)]


def test_contrastive_learners_write_no_captions():
    c = tiny.config("dual_encoder")
    context = base.Context(c, tiny.abstract(c)[0], None, None)
    with pytest.raises(UserError, match="needs captions, which a DualEncoder does not write"):
        CaptionScores(context, CaptionScores.Options())
