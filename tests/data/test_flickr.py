"""The formats of Flickr8k and Flickr30k."""

import pytest

from tests.data.test_question_formats import build, lost
from tests.tools.test_build_dataset import jpeg, read, run, write_files

NAMES = [f"{k}000_{k}a.jpg" for k in range(4)]


@pytest.fixture
def published(tmp_path):
    """Write two captions for each of three images, and one of a missing image, as in Flickr8k."""
    lines = [f"{name}#{k}\tCaption {k} of {name[0]} ." for name in NAMES[:3] for k in range(2)]
    lines.append("2258277193_586949ec62.jpg.1#0\tsome people")
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n")
    photos = {f"Flicker8k_Dataset/{name}": jpeg(k) for k, name in enumerate(NAMES)}
    images = write_files(tmp_path / "Flickr8k_Dataset.zip", photos)
    return ["--captions", tmp_path / "Flickr8k.token.txt", "--images", images]


@pytest.mark.parametrize("suffix", [".jpg", ""])
def test_splits_are_lists_of_images(tmp_path, published, suffix):
    (tmp_path / "train.txt").write_text(f"0000_0a{suffix}\n3000_3a{suffix}\n")
    (tmp_path / "dev.txt").write_text(f"2000_2a{suffix}\n")
    lists = ("--splits", tmp_path / "train.txt", f"val={tmp_path / 'dev.txt'}")
    folder = build(tmp_path, "flickr8k", *published, *lists)
    examples = read(folder, "train")
    assert set(examples) == {NAMES[0]}
    assert examples[NAMES[0]]["captions"] == ["Caption 0 of 0 .", "Caption 1 of 0 ."]
    assert examples[NAMES[0]]["image"] == jpeg(0)
    assert lost(folder, "train") == {"without captions": [NAMES[3]]}
    assert set(read(folder, "val")) == {NAMES[2]}


def test_without_lists_all_are_train(tmp_path, published):
    folder = build(tmp_path, "flickr30k", *published)
    assert set(read(folder, "train")) == set(NAMES[:3])
    assert lost(folder, "train") == {"missing": ["2258277193_586949ec62.jpg.1"]}


def test_other_files_are_refused(tmp_path, published, capsys):
    arguments = ("--name", "mine", "--out", tmp_path / "out", *published)
    assert run("flickr", *arguments, "--splits", "none.txt") == 2
    assert "none.txt: cannot be read" in capsys.readouterr().err
    published[1].write_text("image,caption\n")
    assert run("flickr", *arguments) == 2
    assert "'image,caption' is not NAME.jpg#0, a tab and a caption" in capsys.readouterr().err
