"""Tables of images and captions in TSV, CSV and Parquet."""

import gzip
import io

import pytest

from cap_pretrain.data.examples import pair_id
from tests.data.test_question_formats import build, lost
from tests.tools.test_build_dataset import jpeg, read, report, run, write_files

KAGGLE = """image,caption
1.jpg,"A dog , which runs ."
1.jpg,A black dog .
2.jpg,"A ""cat""
on two lines ."
3.jpg,
4.jpg,Nothing to see .
1.jpg,Too late .
"""


def photos(tmp_path, names=("1.jpg", "2.jpg", "3.jpg")):
    return write_files(tmp_path / "Images", {f"photos/{n}": jpeg(ord(n[0])) for n in names})


@pytest.mark.parametrize("name", ["captions.csv", "captions.csv.gz"])
def test_rows_of_one_image_are_one_example(tmp_path, name):
    """Read a CSV as redistributed for Flickr8k and Flickr30k, for example on Kaggle."""
    data = KAGGLE.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    folder = build(tmp_path, "csv", "--tables", tmp_path / name, "--images", photos(tmp_path))
    examples = read(folder, "train")
    assert {key: e["captions"] for key, e in examples.items()} == {
        "1.jpg": ["A dog , which runs .", "A black dog .", "Too late ."],  # also far apart
        "2.jpg": ['A "cat"\non two lines .'],
    }
    assert examples["1.jpg"]["image"] == jpeg(ord("1"))
    assert lost(folder, "train") == {
        "without captions": ["3.jpg"],
        "missing": ["4.jpg"],
    }
    assert report(folder)["train"]["candidates"] == 4


def test_columns_are_chosen_and_tsv_has_no_quotes(tmp_path):
    text = 'a\t1\tHe said "so\tone\nb\t2\tShort\nc\t3\tThree\ttwo\r\n'
    (tmp_path / "t.tsv").write_text(text, newline="")
    chosen = ("--columns", "key", "number", "first", "second", "--id", "key")
    chosen += ("--image", "number", "--named_by", "stem", "--caption", "first", "second")
    paths = ("--tables", f"val={tmp_path / 't.tsv'}", "--images", photos(tmp_path))
    folder = build(tmp_path, "tsv", *paths, *chosen)
    examples = read(folder, "val")
    assert {key: e["captions"] for key, e in examples.items()} == {
        "a": ['He said "so', "one"],
        "c": ["Three", "two"],
    }
    assert examples["c"]["image"] == jpeg(ord("3"))
    assert lost(folder, "val") == {"not a row": ["row 1"]}


def parquet(path, **columns):
    import pyarrow as pa
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), path)


def test_parquet_may_hold_the_images(tmp_path):
    """Read images stored as by img2dataset (one file per shard) or as by Hugging Face datasets."""
    for shard in range(2):
        keys = [2 * shard, 2 * shard + 1]
        parquet(
            tmp_path / "shards" / f"{shard:05}.parquet",
            url=[f"http://x/{k}" for k in keys],
            caption=[f"caption {k}" for k in keys],
            status=["success", "failed_to_download"],
            jpg=[jpeg(keys[0]), None],
        )
    folder = build(tmp_path, "parquet", "--tables", tmp_path / "shards", "--image", "jpg")
    examples = read(folder, "train")
    assert set(examples) == {pair_id(f"http://x/{k}", [f"caption {k}"]) for k in (0, 2)}
    assert sorted(e["captions"][0] for e in examples.values()) == ["caption 0", "caption 2"]
    assert len(lost(folder, "train")["missing"]) == 2

    images = [{"bytes": jpeg(k), "path": f"{k}.jpg"} for k in range(3)]
    parquet(tmp_path / "hub.parquet", image=images, text=[["a", "b"], ["c"], []])
    arguments = ("--tables", tmp_path / "hub.parquet", "--caption", "text", "--overwrite")
    folder = build(tmp_path, "parquet", *arguments)
    examples = read(folder, "train")
    assert {key: e["captions"] for key, e in examples.items()} == {"0": ["a", "b"], "1": ["c"]}
    assert examples["1"]["image"] == jpeg(1)


@pytest.mark.parametrize("kind", [int, float])
def test_numbers_name_images(kind, tmp_path):
    """Pandas makes floats of a column of numbers that once had a gap."""
    numbers = [kind(n) for n in (1, 1, 3)]
    parquet(tmp_path / "t.parquet", image=numbers, caption=["a", "b", "c"])
    paths = ("--tables", tmp_path / "t.parquet", "--images", photos(tmp_path))
    examples = read(build(tmp_path, "parquet", *paths, "--named_by", "stem"), "train")
    assert {key: e["captions"] for key, e in examples.items()} == {"1": ["a", "b"], "3": ["c"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tables t.csv --images Images --caption text", "no column 'text'. Choose from: caption"),
        ("--tables t.csv --images Images --image imag", "Did you mean 'image'?"),
        ("--tables t.csv --images Images --named_by crc32", "no column 'url'"),
        ("--tables t.csv", "--images: none for split 'train'"),
        ("--tables t.csv --images val=Images train=Images", "--tables: none for split 'val'"),
        ("--tables none.csv --images Images", "none.csv: cannot be read"),
        ("--tables t.txt --images Images", "t.txt: not a table, nor a folder with one"),
        ("--tables broken.parquet", "broken.parquet: cannot be read"),
        ("--tables broken.csv.gz --images Images", "broken.csv.gz: cannot be read"),
    ],
)
def test_mistakes_are_reported(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path)
    (tmp_path / "t.csv").write_text(KAGGLE)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "broken.csv.gz").write_bytes(gzip.compress(KAGGLE.encode())[:40])
    assert run("table", "--name", "mine", "--out", "out", *arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) <= 2


def test_a_row_that_csv_cannot_read_costs_itself(tmp_path):
    file = io.StringIO()
    file.write("image,caption\n1.jpg,one\n2.jpg," + 200_000 * "x" + "\n3.jpg,three\n")
    (tmp_path / "t.csv").write_text(file.getvalue())
    paths = ("--tables", tmp_path / "t.csv", "--images", photos(tmp_path))
    folder = build(tmp_path, "csv", *paths)
    assert set(read(folder, "train")) == {"1.jpg", "3.jpg"}
    assert lost(folder, "train") == {"not a row": ["row 1"]}
