"""Text that is odd but common: other encodings, line breaks, missing ids, values of any type."""

import os

import pytest

from cap_pretrain.data.builders.filters import condition
from cap_pretrain.data.builders.formats import flickr, table
from tests.data.test_question_formats import build, lost
from tests.data.test_tables import parquet, photos
from tests.data.test_webdataset import tar
from tests.tools.test_build_dataset import jpeg, read, report, run, write_files


def test_names_of_class_folders_are_printable(tmp_path):
    for name in (b"caf\xe9", b"two\nlines", b"dog", b" "):
        write_files(tmp_path / "photos" / os.fsdecode(name), {os.fsdecode(b"\xe9.jpg"): jpeg(1)})
    folder = build(tmp_path, "image_folder", "--images", tmp_path / "photos")
    names = (folder / "1.0.0" / "label.labels.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(names) == ["' '", "caf\\udce9", "dog", "two\\nlines"]
    assert report(folder)["train"]["kept"] == 4


def test_texts_of_tars_that_are_not_utf_8_are_counted(tmp_path):
    tar(tmp_path / "a.tar", [("a.jpg", jpeg(1)), ("a.txt", b"caf\xe9")])
    folder = build(tmp_path, "webdataset", "--shards", tmp_path / "a.tar")
    assert read(folder, "train")["a/a"]["captions"] == ["caf\ufffd"]
    assert report(folder)["train"]["texts_mended"] == 1


def test_lines_end_at_line_feeds_only(tmp_path):
    (tmp_path / "c.token").write_text("1.jpg#0\ta\u2028b\x0cc\n", encoding="utf-8")
    assert flickr.read_captions(tmp_path / "c.token") == {"1.jpg": ["a\u2028b\x0cc"]}


def test_rows_without_an_id_are_not_merged(tmp_path):
    (tmp_path / "t.csv").write_text("image,caption,key\n1.jpg,a,\n2.jpg,b,\n3.jpg,c,k\n")
    arguments = ("--tables", tmp_path / "t.csv", "--images", photos(tmp_path), "--id", "key")
    folder = build(tmp_path, "csv", *arguments)
    assert set(read(folder, "train")) == {"k"}
    assert lost(folder, "train") == {"without id": ["row 0", "row 1"]}


def test_scattered_rows_have_a_limit_in_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table, "MAX_SCATTERED", 1000)
    (tmp_path / "t.csv").write_text("image,caption\n" + "1.jpg,a\n2.jpg,b\n" * 4)
    paths = ("--tables", tmp_path / "t.csv", "--images", photos(tmp_path))
    assert run("csv", "--name", "mine", "--out", tmp_path / "out", *paths) == 2
    assert "sort them by column image" in capsys.readouterr().err


def test_lists_of_conceptual_captions_may_have_another_encoding(tmp_path, capsys):
    (tmp_path / "l.tsv").write_bytes(b"caf\xe9\thttp://x/1\n")
    images = write_files(tmp_path / "Images", {"0.jpg": jpeg(1)})
    paths = ("--lists", tmp_path / "l.tsv", "--images", images)
    assert run("cc3m", "--name", "mine", "--out", tmp_path / "out", *paths) == 2
    assert "--encoding=cp1252" in capsys.readouterr().err
    folder = build(tmp_path, "cc3m", *paths, "--encoding", "cp1252")
    assert [e["captions"] for e in read(folder, "train").values()] == [["caf\xe9"]]


@pytest.mark.parametrize("value", [10**400, -(10**400), [], {"a": []}, None, b"\xff", float("nan")])
@pytest.mark.parametrize("test", ["width>3", "width==3", "width!=a"])
def test_conditions_hold_or_not_for_values_of_any_type(value, test):
    assert isinstance(condition(test).problem({"width": value}), str)


def test_rows_of_parquet_that_repeat_a_large_value_are_not_all_read(tmp_path, capsys):
    """A dictionary holds a value once, however many rows have it."""
    import pyarrow as pa

    large = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), ["y" * 2**24])
    parquet(tmp_path / "t.parquet", image=["a"] * 2000, caption=large)
    arguments = ("parquet", "--name", "mine", "--out", tmp_path / "out")
    assert run(*arguments, "--tables", tmp_path / "t.parquet") == 2
    assert "its rows have over 200 times its size" in capsys.readouterr().err
