"""Captions of scenes are correct if they name every object."""

import pytest

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.errors import UserError
from cap_pretrain.evals import scene_captions
from cap_pretrain.evals.inference.captioning import Caption
from cap_pretrain.evals.scene_captions import SceneCaptions

SOURCE = Scenes("val", 16, length_val=20, partial_captions=False, max_objects=2)


class Context:
    workdir = None  # outside a run

    def __init__(self, source=SOURCE):
        self._source = source

    def source(self, split, data):
        assert data == "scenes"
        return self._source


@pytest.fixture
def judged(monkeypatch):
    """Return a function from captions to the evaluator's result."""

    def judge(captions, workdir=None):
        class Captioning:
            def __init__(self, context, source, *, batch_size, limit, how, part):
                assert limit == 20 and how.method == "greedy"

            def scored(self, variables):
                for index, text in captions.items():
                    yield index, [Caption(text, -1.0, 3)]

            def recorded(self, written):
                return {}

        monkeypatch.setattr(scene_captions, "Captioning", Captioning)
        context = Context()
        context.workdir = workdir
        return SceneCaptions(context, SceneCaptions.Options(count=20))(None)

    return judge


def right(i):
    return " and ".join(f"a {t.colour} {t.shape}" for t in SOURCE.scene(i).things)


def test_captions_that_name_everything_are_right(judged):
    result = judged({i: right(i) for i in range(20)})
    assert result.metrics["accuracy"] == 1
    assert result.metrics["accuracy_1_objects"] == result.metrics["accuracy_2_objects"] == 1
    protocol = result.details.pop("protocol")
    assert protocol == "greedy decoding; every object's colour and shape, and no other"
    expected = {"dataset": "scenes", "split": "val", "images": 20, "mistakes": []}
    assert result.details == expected
    assert result.lines[0].startswith("20 of 20 captions") and "100.0%" in result.lines[0]


def test_the_datasets_own_full_captions_are_right(judged):
    assert judged({i: SOURCE[i]["captions"][i % 5] for i in range(20)}).metrics["accuracy"] == 1


def test_wrong_captions_are_wrong_and_listed(judged):
    two = [i for i in range(20) if len(SOURCE.scene(i).things) == 2]
    one = [i for i in range(20) if len(SOURCE.scene(i).things) == 1]
    first, second = SOURCE.scene(two[0]).things
    captions = {i: right(i) for i in range(20)}
    captions[two[0]] = f"a {first.colour} {first.shape}"  # leaves one out
    captions[two[1]] = right(two[1]) + " and a red heart and a blue ring"  # invents some
    captions[two[2]] = ""
    captions[one[0]] = right(one[0]).replace(SOURCE.scene(one[0]).things[0].colour, "striped")
    result = judged(captions)
    assert result.metrics["accuracy"] == 16 / 20
    assert result.metrics["accuracy_2_objects"] == (len(two) - 3) / len(two)
    mistakes = {mistake["index"]: mistake for mistake in result.details["mistakes"]}
    assert mistakes.keys() == {two[0], two[1], two[2], one[0]}
    assert mistakes[two[0]]["caption"] == captions[two[0]]
    assert mistakes[two[0]]["mentioned"] == [(first.colour, first.shape)]
    assert (second.colour, second.shape) in mistakes[two[0]]["true"]


def test_a_run_shows_right_and_wrong_captions(judged, tmp_path):
    captions = {i: right(i) if i % 2 else "a lamp" for i in range(20)}
    assert not judged(captions).exhibits
    shown = judged(captions, tmp_path).exhibits
    assert [exhibit.title for exhibit in shown] == [f"val/{i}" for i in range(12)]
    for i, exhibit in enumerate(shown):
        caption, reference = exhibit.lines[:2]
        assert (caption.text, caption.right) == (captions[i], i % 2 == 1)
        assert reference.text == SOURCE[i]["captions"][0]
        assert (exhibit.panels[0].image == SOURCE[i]["image"]).all()


def test_exchanged_colours_are_wrong(judged):
    index, things = next(
        (i, things)
        for i in range(20)
        if len(things := SOURCE.scene(i).things) == 2
        and things[0].colour != things[1].colour
        and things[0].shape != things[1].shape
    )
    a, b = things
    captions = {i: right(i) for i in range(20)}
    captions[index] = f"a {b.colour} {a.shape} and a {a.colour} {b.shape}"
    assert judged(captions).metrics["accuracy"] == 19 / 20


def test_other_datasets_have_no_scenes_to_judge_by():
    with pytest.raises(UserError, match="scene_captions works on the dataset `scenes` only"):
        SceneCaptions(Context([1, 2]), SceneCaptions.Options())
