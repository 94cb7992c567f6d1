"""The format of VizWiz-Captions."""

import pytest

from tests.data.test_question_formats import build, lost, write_json
from tests.tools.test_build_dataset import jpeg, read, run, write_files


@pytest.fixture
def published(tmp_path):
    """Write three images: without marked captions, with some, and with only marked ones."""
    name = "VizWiz_train_{:08d}.jpg"
    url = "https://ivc.ischool.utexas.edu/VizWiz_visualization_img/"
    images = [
        {"file_name": name.format(i), "vizwiz_url": url + name.format(i), "id": i}
        | {"text_detected": False}
        for i in range(3)
    ]
    captions = [
        (0, "A can of beer.", False, False),
        (0, " A hand. ", False, False),
        (1, "asdf", True, False),
        (1, "Quality issues are too severe to recognize visual content.", False, True),
        (1, "A table.", False, False),
        (2, "Quality issues are too severe to recognize visual content.", False, True),
    ]
    annotations = [
        {"caption": text, "image_id": image, "is_precanned": precanned, "is_rejected": rejected}
        | {"id": number, "text_detected": True}
        for number, (image, text, rejected, precanned) in enumerate(captions)
    ]
    content = {"info": {}, "images": images, "annotations": annotations}
    photos = {f"train/{name.format(i)}": jpeg(i) for i in range(3)}
    paths = write_json(tmp_path / "train.json", content), write_files(tmp_path / "t.zip", photos)
    return ["--annotations", paths[0], "--images", paths[1]]


def test_marked_captions_are_left_out(tmp_path, published):
    folder = build(tmp_path, "vizwiz", *published)
    examples = read(folder, "train")
    assert {key: e["captions"] for key, e in examples.items()} == {
        "0": ["A can of beer.", "A hand."],
        "1": ["A table."],
    }
    assert examples["1"]["image"] == jpeg(1)
    assert lost(folder, "train") == {"without captions": ["2"]}


@pytest.mark.parametrize(("keep", "counts"), [("rejected", [2, 2]), ("precanned", [2, 2, 1])])
def test_marked_captions_may_be_kept(tmp_path, published, keep, counts):
    folder = build(tmp_path, "vizwiz", *published, "--keep", keep)
    examples = read(folder, "train")
    assert [len(examples[key]["captions"]) for key in sorted(examples)] == counts


def test_both_may_be_kept(tmp_path, published):
    folder = build(tmp_path, "vizwiz", *published, "--keep", "rejected", "precanned")
    assert sum(len(e["captions"]) for e in read(folder, "train").values()) == 6


def test_other_marks_are_refused(tmp_path, published, capsys):
    arguments = ("--name", "mine", "--out", tmp_path / "out", *published, "--keep", "spam")
    assert run("vizwiz", *arguments) == 2
    assert "spam" in capsys.readouterr().err
