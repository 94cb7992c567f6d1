"""The format of Open Images."""

import gzip

import pytest

from cap_pretrain.data.sources.open import open_source
from tests.data.test_question_formats import build, lost
from tests.tools.test_build_dataset import jpeg, read, run, write_files

CLASSES = """/m/0dog,Dog
/m/0crane1,Crane
/m/0crane2,Crane
/m/0animal,Animal
/m/0unused,Wardrobe
"""
HEADER = "ImageID,Source,LabelName,Confidence\n"
TRAIN = """000a,verification,/m/0animal,1
000a,verification,/m/0dog,1
000a,crowdsource-verification,/m/0crane1,0
000b,verification,/m/0animal,1
000b,verification,/m/0not_described,1
000c,machine,/m/0animal,0.6
000c,machine,/m/0crane1,0.9
000c,machine,/m/0dog,0.3
000d,verification,/m/0dog,0
ffff,verification,/m/0dog,1
"""
VAL = """00aa,verification,/m/0crane2,1
00bb,verification,/m/0animal,1
"""


@pytest.fixture
def published(tmp_path):
    """Return options for two splits, one of them gzipped and zipped."""
    (tmp_path / "class-descriptions.csv").write_text(CLASSES)
    (tmp_path / "train-labels.csv").write_text(HEADER + TRAIN)
    (tmp_path / "val-labels.csv.gz").write_bytes(gzip.compress((HEADER + VAL).encode()))
    train = write_files(tmp_path / "train", {f"000{i}.jpg": jpeg(ord(i)) for i in "abcd"})
    val = write_files(
        tmp_path / "val.zip", {"validation/00aa.jpg": jpeg(1), "validation/00bb.jpg": b"x"}
    )
    labels = ("--labels", tmp_path / "train-labels.csv", f"val={tmp_path / 'val-labels.csv.gz'}")
    images = ("--images", train, f"val={val}")
    return [*labels, *images, "--classes", tmp_path / "class-descriptions.csv"]


def named(folder, split):
    names = open_source(str(folder), split, image_size=8).class_names
    return {key: names[example["label"]] for key, example in read(folder, split).items()}


def test_an_image_gets_its_surest_and_then_rarest_label(tmp_path, published):
    folder = build(tmp_path, "openimages", *published)
    assert named(folder, "train") == {"000a": "Dog", "000b": "Animal", "000c": "Crane (/m/0crane1)"}
    assert read(folder, "train")["000a"]["image"] == jpeg(ord("a"))
    assert lost(folder, "train") == {"without label": ["000d"]}
    assert named(folder, "val") == {"00aa": "Crane (/m/0crane2)"}
    assert lost(folder, "val") == {"broken": ["00bb"]}
    names = open_source(str(folder), "val", image_size=8).class_names
    assert names == ["Animal", "Crane (/m/0crane1)", "Crane (/m/0crane2)", "Dog"]


def test_the_classes_wanted_and_the_least_confidence_are_chosen(tmp_path, published):
    part = tmp_path / "part.csv"  # with a header, like the files of V6
    part.write_text("LabelName,DisplayName\n/m/0dog,Dog\n/m/0crane2,Crane\n")
    folder = build(tmp_path, "openimages", *published[:-1], part, "--confidence", "0.2")
    assert named(folder, "train") == {"000a": "Dog", "000c": "Dog"}


@pytest.mark.parametrize(
    ("which", "text", "message"),
    [
        ("train-labels.csv", "a,b\n1,2\n", "no column ImageID (found: a, b)"),
        ("train-labels.csv", HEADER + "000a,x,/m/0dog,much\n", "line 2 is not understood"),
        ("train-labels.csv", HEADER + "ffff,x,/m/0dog,1\n", "no image present has a label"),
        ("class-descriptions.csv", "Dog\n", "must have lines like /m/0bt9lr,Dog"),
        ("val-labels.csv.gz", "\x1f\x8bno gzip", "val-labels.csv.gz: cannot be read"),
    ],
)
def test_mistakes_are_reported(tmp_path, published, capsys, which, text, message):
    (tmp_path / "val-labels.csv.gz").write_bytes(gzip.compress(HEADER.encode()))
    (tmp_path / which).write_text(text, encoding="latin-1")
    assert run("openimages", "--name", "mine", "--out", tmp_path / "out", *published) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) <= 2


def test_a_split_needs_labels_and_images(tmp_path, published, capsys):
    published[published.index("--images") + 1] = f"test={tmp_path / 'train'}"
    assert run("openimages", "--name", "mine", "--out", tmp_path / "out", *published) == 2
    assert "add " in capsys.readouterr().err
