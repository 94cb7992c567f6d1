"""Text that is not Unicode, stray quotes, unasked columns and captions far apart."""

import csv
import io
import json
import random

import pyarrow as pa
import pytest
from pyarrow import parquet

from cap_pretrain.data.builders.rows import Form, read_rows
from cap_pretrain.errors import UserError
from tests.data.test_names import karpathy
from tests.data.test_question_formats import build, lost
from tests.data.test_webdataset import sample, tar
from tests.tools.test_build_dataset import jpeg, read, report, run, write_files


@pytest.fixture
def photos(tmp_path):
    return write_files(tmp_path / "photos", {f"{n}.jpg": jpeg(n) for n in range(6)})


def captions(folder):
    return {key: example["captions"] for key, example in read(folder, "train").items()}


def adds_up(folder):
    """Return whether every candidate of every split was kept or dropped for a reason."""
    return all(
        split["candidates"] == split["kept"] + sum(d["count"] for d in split["dropped"].values())
        for split in report(folder).values()
    )


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path, photos, capsys):
    content = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(("0.jpg", "\ud83d.jpg"))],
        "annotations": [
            {"image_id": 0, "caption": "half \ud83d, whole \ud83d\ude00"},
            {"image_id": 1, "caption": "of an image that is missing"},
        ],
    }
    (tmp_path / "c.json").write_text(json.dumps(content))
    options = ["--annotations", tmp_path / "c.json", "--images", photos]
    folder = build(tmp_path, "captions_json", *options)
    assert captions(folder) == {"0": ["half \ufffd, whole \U0001f600"]}
    assert lost(folder, "train") == {"missing": ["1"]}
    assert report(folder)["train"]["texts_mended"] == 1
    assert "1 texts not in Unicode, mended" in capsys.readouterr().out
    assert "\\\\ud83d.jpg" in (folder / "1.0.0" / "dropped.jsonl").read_text()


def test_names_that_are_not_utf_8_stay_distinct(tmp_path):
    members = sample("a\udce8", jpeg(0), "first") + sample("a\udce9", jpeg(1), "second")
    tar(tmp_path / "0.tar", members)
    folder = build(tmp_path, "webdataset", "--shards", tmp_path / "0.tar")
    assert captions(folder) == {"0/a\\udce8": ["first"], "0/a\\udce9": ["second"]}


YEAR_10000 = 253_402_300_800_000_000  # in microseconds
LATIN = "image,caption\n0.jpg,café où\n1.jpg,a cat\n"


def test_a_table_in_another_encoding_is_refused_until_it_is_named(tmp_path, photos, capsys):
    (tmp_path / "t.csv").write_bytes(LATIN.encode("cp1252"))
    options = ["--tables", tmp_path / "t.csv", "--images", photos]
    assert run("csv", "--name", "mine", "--out", tmp_path / "out", *options) == 2
    assert "1 of the first 3 rows are not UTF-8" in capsys.readouterr().err
    folder = build(tmp_path, "csv", *options, "--encoding", "cp1252")
    assert captions(folder) == {"0.jpg": ["café où"], "1.jpg": ["a cat"]}
    folder = build(tmp_path, "csv", *options, "--encoding", "utf-8", "--overwrite")
    assert captions(folder)["0.jpg"] == ["caf\ufffd o\ufffd"]
    assert report(folder)["train"]["texts_mended"] == 1
    for name in ("klingon", "base64", "\0"):
        arguments = [*options, "--encoding", name, "--overwrite"]
        assert run("csv", "--name", "mine", "--out", tmp_path / "out", *arguments) == 2
        assert "is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_of_byte_order_are_no_text(tmp_path, photos, encoding):
    (tmp_path / "T.CSV").write_bytes(LATIN.encode(encoding))
    more = ["--encoding", encoding] if encoding == "utf-16" else []
    folder = build(tmp_path, "csv", "--tables", tmp_path / "T.CSV", "--images", photos, *more)
    assert captions(folder)["0.jpg"] == ["café où"]


def test_few_rows_in_another_encoding_are_mended(tmp_path, photos):
    rows = [b"image,caption"] + [b"%d.jpg,a cat" % (n % 6) for n in range(99)] + [b"0.jpg,caf\xe9"]
    (tmp_path / "t.csv").write_bytes(b"\n".join(rows))
    folder = build(tmp_path, "csv", "--tables", tmp_path / "t.csv", "--images", photos)
    assert captions(folder)["0.jpg"][-1] == "caf\ufffd"


@pytest.mark.parametrize(
    ("text", "expected", "broken"),
    [
        ('0,a 12" pizza\n1,"a 12 pizza\n2,a cat\n3,a dog\n', {0: 'a 12" pizza', 2: "a cat"}, 1),
        ('0,"open\n1,"closed"\n2,a cat\n', {1: "closed", 2: "a cat"}, 1),
        ('0,"open\n1,a\n2,"b, c"\n3,a cat\n', {1: "a", 2: "b, c", 3: "a cat"}, 1),
        ('0,"two\nlines"\n1,"a ""b"", c"\n', {0: "two\nlines", 1: 'a "b", c'}, 0),
        ("0,a\u2028b\x0bc\x85d\n1,x\n", {0: "a\u2028b\x0bc\x85d", 1: "x"}, 0),
        ('0,"' + "x\n" * 200 + '"\n1,a cat\n', {1: "a cat"}, 201),
        ("0,a\n1," + "x" * 2**18 + "\n2,b\n", {0: "a", 2: "b"}, 1),
    ],
    ids=["end", "next", "later", "quoted", "separators", "long", "wide"],
)
def test_a_stray_quote_costs_its_own_row(tmp_path, text, expected, broken):
    path = tmp_path / "t.csv"
    path.write_text("image,caption\n" + text, newline="", encoding="utf-8")
    rows = list(read_rows(path, Form(), ("image", "caption")))
    found = {int(row["image"]): row["caption"] for row in rows if row and len(row["caption"]) < 99}
    assert expected.items() <= found.items()
    assert sum(not row for row in rows) == broken


def test_captions_of_an_image_may_be_far_apart(tmp_path, photos):
    rows = [(0, "a"), (1, "b"), (0, "c"), (2, "d"), (1, "e"), (0, "f")]
    text = "".join(f"{n}.jpg,{caption}\n" for n, caption in rows)
    (tmp_path / "t.csv").write_text("image,caption\n" + text)
    folder = build(tmp_path, "csv", "--tables", tmp_path / "t.csv", "--images", photos)
    assert captions(folder) == {"0.jpg": ["a", "c", "f"], "1.jpg": ["b", "e"], "2.jpg": ["d"]}
    assert adds_up(folder)
    # An id that stands for two images is a mistake, which is counted.
    (tmp_path / "t.csv").write_text("id,image,caption\nx,0.jpg,a\ny,1.jpg,b\nx,2.jpg,c\n")
    options = ["--tables", tmp_path / "t.csv", "--images", photos, "--id", "id", "--overwrite"]
    folder = build(tmp_path, "csv", *options)
    assert captions(folder) == {"x": ["a"], "y": ["b"]}
    assert lost(folder, "train") == {"duplicate id": ["x"]}


def bad_text(values):
    """Return an Arrow array of text from bytes that may not be UTF-8."""
    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


def test_parquet_with_invalid_text_and_columns_that_python_cannot_hold(tmp_path):
    images = [jpeg(n) for n in range(3)]
    names = bad_text([b"0.jpg", b"\xff.jpg", b"2.jpg"])
    table = pa.table(
        {
            "image": pa.StructArray.from_arrays([pa.array(images), names], ["bytes", "path"]),
            "caption": pa.ListArray.from_arrays([0, 1, 2, 3], bad_text([b"a", b"caf\xe9", b"c"])),
            "far": pa.array([YEAR_10000] * 3, pa.timestamp("us")),
            "fine": pa.array([1] * 3, pa.timestamp("ns")),
            "score": [0.1, 0.9, 0.9],
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    options = ["--tables", tmp_path / "t.parquet", "--where", "score>0.5"]
    folder = build(tmp_path, "parquet", *options)
    assert sorted(captions(folder).values()) == [["c"], ["caf\ufffd"]]
    assert adds_up(folder)
    with pytest.raises((OverflowError, ValueError)):  # what reading all columns would end in
        table["far"].to_pylist()


def test_parquet_with_a_dictionary_of_names(tmp_path, photos):
    """What pandas writes for a column of categories: each batch refers to all of them."""
    names = [f"{n % 6}.jpg" for n in range(600)] + [f"{n:0999}.jpg" for n in range(3000)]
    table = {"image": pa.array(names).dictionary_encode(), "caption": ["a"] * len(names)}
    parquet.write_table(pa.table(table), tmp_path / "t.parquet")
    rows = list(read_rows(tmp_path / "t.parquet", Form(), ("image", "caption")))
    assert [row["image"] for row in rows] == names


def test_a_column_for_a_filter_that_python_cannot_hold_is_named(tmp_path, capsys):
    table = pa.table(
        {"image": ["a"], "caption": ["b"], "far": pa.array([YEAR_10000], pa.timestamp("us"))}
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    write_files(tmp_path / "i", {"a": jpeg(0)})
    options = ["--tables", tmp_path / "t.parquet", "--images", tmp_path / "i", "--where", "far>1"]
    assert run("parquet", "--name", "mine", "--out", tmp_path / "out", *options) == 2
    assert "t.parquet: cannot be read" in capsys.readouterr().err


def random_text(rng):
    pieces = ["a", "é", '"', ",", "\n", "\r\n", "\t", "\0", "\u2028", "\U0001f600", "\ud83d", " "]
    return "".join(rng.choices(pieces, k=rng.randint(0, 8)))


@pytest.mark.slow
def test_any_table_is_read_or_refused_and_rows_add_up(tmp_path):
    """2,000 tables of random rows: good rows are read back, whatever stands between them."""
    rng = random.Random(0)
    for number in range(2000):
        file = io.StringIO(newline="")
        writer = csv.writer(file)
        good, whole = {}, True
        for n in range(rng.randint(0, 6)):
            if rng.random() < 0.3:
                file.write(random_text(rng) + "\n")
                whole = False
            else:
                good[f"{n}.jpg"] = random_text(rng).replace("\ud83d", "")
                writer.writerow([f"{n}.jpg", good[f"{n}.jpg"]])
        kind = rng.choice([".csv", ".tsv"])
        path = tmp_path / f"{number}{kind}"
        path.write_bytes(file.getvalue().encode("utf-8", "surrogatepass"))
        rows = list(read_rows(path, Form(("image", "caption")), ("image", "caption")))
        assert all(row == {} or set(row) == {"image", "caption"} for row in rows)
        if whole and kind == ".csv":
            assert {row["image"]: row["caption"] for row in rows} == good
        path.unlink()


@pytest.mark.slow
def test_any_json_builds_or_is_refused(tmp_path, photos, capsys):
    """2,000 random JSON files in the forms of two formats: exit 0 or 2, and counts add up."""
    rng = random.Random(0)
    values = [None, True, 1, 1.0, -1, 1e400, "", "x", "\ud83d", "0.jpg", [], {}, [[]], "9" * 400]

    def value(good):
        return good if rng.random() < 0.8 else rng.choice(values)

    for number in range(2000):
        images = [
            {
                **{"split": value("train"), "filename": value(f"{n}.jpg"), "imgid": value(n)},
                **{"id": value(n), "file_name": value(f"{n}.jpg")},
                "sentences": value([{"raw": value("a")}]),
            }
            for n in range(rng.randint(0, 3))
        ]
        notes = [{"image_id": value(n), "caption": value("a")} for n in range(rng.randint(0, 3))]
        content = {"images": value(images), "annotations": value(notes)}
        text = json.dumps(content)
        if rng.random() < 0.1:
            cut = rng.randrange(len(text))
            text = text[:cut] + rng.choice(["", "[" * 100_000, "9" * 5000]) + text[cut:]
        (tmp_path / "c.json").write_text(text)
        format_name = rng.choice(["captions_json", "karpathy"])
        options = ["--annotations", tmp_path / "c.json", "--images", photos, "--overwrite"]
        code = run(format_name, "--name", "mine", "--out", tmp_path / "out", *options)
        error = capsys.readouterr().err
        assert code in (0, 2), (number, error)
        if code == 2:
            assert len(error.splitlines()) <= 2 and "Traceback" not in error
        else:
            assert adds_up(tmp_path / "out" / "mine")


def test_splits_of_karpathy_add_up(tmp_path, photos):
    file = karpathy(tmp_path / "k.json", [("train", f"{n % 7}.jpg", n % 5) for n in range(12)])
    folder = build(tmp_path, "karpathy", "--annotations", file, "--images", photos)
    assert report(folder)["train"]["candidates"] == 12
    assert adds_up(folder)


def test_read_rows_refuses_what_is_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        list(read_rows(tmp_path, Form(("a",)), ("a",)))
