"""Questions about images are deterministic and have a true caption and false ones by kind."""

import gzip
import json
import zipfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from cap_pretrain.data.hard_negatives import OrderQuestions, SceneQuestions
from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.scenes.text import mentions
from cap_pretrain.data.sugarcrepe import SugarCrepe
from cap_pretrain.errors import UserError

KINDS = {
    "colour_replaced",
    "shape_replaced",
    "attributes_swapped",
    "relation_reversed",
    "objects_exchanged",
    "count_changed",
}


def test_scenes_ask_about_every_kind_of_negative():
    source = Scenes("val", 16, length_val=60)
    questions_of = SceneQuestions(source)
    kinds = Counter()
    for index in range(60):
        questions = questions_of.questions(index)
        assert questions == questions_of.questions(index)
        assert len({question.true for question in questions}) == len(questions) <= 2
        found = {k: (q.true, false) for q in questions for k, false in q.false.items()}
        assert found == source.negatives(index)
        kinds.update(found.keys())
    assert kinds.keys() == KINDS and min(kinds.values()) > 10


def test_questions_about_scenes_with_plain_captions_are_plain():
    source = Scenes("val", 16, length_val=60, plain_captions=True, synonyms=False, max_objects=2)
    kinds = set()
    for index in range(60):
        for question in SceneQuestions(source).questions(index):
            captions = [sorted(caption.split()) for caption in source[index]["captions"]]
            assert sorted(question.true.split()) in captions  # in any order
            kinds |= question.false.keys()
    assert kinds == {"colour_replaced", "shape_replaced", "attributes_swapped"}


def test_counts_stay_among_those_of_the_dataset():
    questions_of = SceneQuestions(Scenes("val", 16, length_val=40, min_objects=2))
    counted = [
        q.false["count_changed"]
        for i in range(40)
        for q in questions_of.questions(i)
        if "count_changed" in q.false
    ]
    assert len(counted) == 40 and not any(" one " in f" {text} " for text in counted)
    only_two = SceneQuestions(Scenes("val", 16, length_val=9, min_objects=2, max_objects=2))
    assert not any("count_changed" in q.false for i in range(9) for q in only_two.questions(i))


class Captioned:
    class_names = []

    def __init__(self, *captions):
        self._captions = captions

    def __len__(self):
        return len(self._captions)

    def __getitem__(self, index):
        return {"image": None, "captions": self._captions[index], "label": -1, "id": str(index)}


def test_order_questions_ask_about_every_caption_that_has_another_order():
    captions = ["A man, smiling, rides a horse.", "Dog.", "A dog and a cat sleep!"]
    questions_of = OrderQuestions(Captioned(captions, [], captions[:1]))
    assert [q.true for q in questions_of.questions(0)] == [
        "a man smiling rides a horse",
        "a dog and a cat sleep",
    ]
    assert questions_of.questions(1) == []
    assert questions_of.questions(0) == questions_of.questions(0)
    assert (
        questions_of.questions(2)[0].false != questions_of.questions(0)[0].false
    )  # another image, another seed


def test_scenes_in_other_orders_never_name_the_same_objects():
    questions_of = OrderQuestions(Scenes("val", 16, length_val=40, plain_captions=True))
    swapped = 0
    for index in range(40):
        for question in questions_of.questions(index):
            for kind in ("nouns_and_adjectives", "trigrams"):
                if kind in question.false:
                    false = question.false[kind]
                    assert Counter(mentions(false)) != Counter(mentions(question.true))
                    swapped += kind == "nouns_and_adjectives"
    assert swapped > 50


# SugarCrepe


def entry(name, caption, negative):
    return {"filename": name, "caption": caption, "negative_caption": negative}


@pytest.fixture
def files(tmp_path):
    """(folder with two json files in SugarCrepe's layout, folder with three images)."""
    tests = {
        "swap_att": {
            "0": entry("000000000002.jpg", "a red cat on a blue mat", "a blue cat on a red mat"),
            "1": entry("000000000001.jpg", "one dog", "two dogs"),
        },
        "add_obj": {"0": entry("000000000002.jpg", "a cat", "a cat and a dog")},
    }
    (tmp_path / "data").mkdir()
    for name, entries in tests.items():
        text = json.dumps(entries, indent=4)
        (tmp_path / "data" / f"{name}.json").write_text(text, encoding="utf-8")
    (tmp_path / "images" / "val2017").mkdir(parents=True)
    for k in (1, 2, 3):
        image = Image.fromarray(np.full((8, 8, 3), 60 * k, np.uint8))
        image.save(tmp_path / "images" / "val2017" / f"{k:012}.jpg")
    return tmp_path / "data", tmp_path / "images"


def test_sugarcrepe_joins_the_questions_of_all_files(files):
    questions_of = SugarCrepe(*map(str, files))
    assert len(questions_of.source) == 2  # there is no question about the third image
    ids = [questions_of.source[k]["id"] for k in range(2)]
    assert ids == ["val2017/000000000002.jpg", "val2017/000000000001.jpg"]
    assert [(q.true, q.false) for q in questions_of.questions(0)] == [
        ("a cat", {"add_obj": "a cat and a dog"}),
        ("a red cat on a blue mat", {"swap_att": "a blue cat on a red mat"}),
    ]
    assert [(q.true, q.false) for q in questions_of.questions(1)] == [
        ("one dog", {"swap_att": "two dogs"})
    ]
    assert questions_of.source[0]["image"].startswith(b"\xff\xd8")


def test_sugarcrepe_reads_images_out_of_a_zip(files, tmp_path):
    archive = tmp_path / "val2017.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in files[1].rglob("*.jpg"):
            file.write(path, f"val2017/{path.name}")
    folder, zipped = SugarCrepe(*map(str, files)), SugarCrepe(str(files[0]), str(archive))
    assert folder.source[1] == zipped.source[1]


def test_sugarcrepe_is_read_from_the_authors_repository(files):
    """With its other files, and with files that were compressed."""
    data, images = files
    plain = SugarCrepe(str(data), str(images))
    packed = data / "swap_att.json"
    (data / "swap_att.json.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    (data / "results.json").write_text("[1, 2]")
    (data / "swap_att.txt").write_text("notes")
    (data.parent / "README.md").write_text("notes")
    (data.parent / "package.json").write_text("{}")
    found = SugarCrepe(str(data.parent), str(images))
    assert [found.questions(k) for k in range(2)] == [plain.questions(k) for k in range(2)]


def test_sugarcrepe_reports_what_is_missing(files, tmp_path):
    data, images = files
    assert SugarCrepe(str(data), str(images)).lines == ()
    (images / "val2017" / "000000000002.jpg").unlink()
    partial = SugarCrepe(str(data), str(images))
    assert partial.counts == {"missing_images": 1, "questions_left_out": 2}
    (line,) = partial.lines
    assert line.startswith("1 of 2 images are not in ") and "so 2 questions are left out" in line
    assert [q.true for q in partial.questions(0)] == ["one dog"] and len(partial.source) == 1
    (images / "val2017" / "000000000001.jpg").unlink()
    with pytest.raises(UserError, match="none of the images that SugarCrepe asks about"):
        SugarCrepe(str(data), str(images))
    with pytest.raises(UserError, match="no folder with SugarCrepe's files"):
        SugarCrepe(str(tmp_path / "nowhere"), str(images))
    for content, message in (("[1]", "not a SugarCrepe file"), ("{", "is not JSON")):
        (data / "add_att.json").write_text(content)
        with pytest.raises(UserError, match=message):
            SugarCrepe(str(data), str(images))
