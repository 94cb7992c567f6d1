"""Training on Parquet files in their original layout: a row group is a block."""

import io
import json
import pickle
import random
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
from pyarrow import parquet

from cap_pretrain.data.sources import footer, row_groups
from cap_pretrain.data.sources import parquet as source_of
from cap_pretrain.data.sources.base import NoSplitError, block_bounds
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.errors import UserError
from tests.data.test_question_formats import build
from tests.tools.test_build_dataset import jpeg, read


def table(start, count, **more):
    keys = range(start, start + count)
    images = [{"bytes": jpeg(k), "path": f"{k}.jpg"} for k in keys]
    return pa.table({"image": images, "text": [[f"caption {k}", "b"] for k in keys], **more})


@pytest.fixture
def folder(tmp_path):
    """The layout of the Hub: a folder "data" with files of 5, 4 and 5 rows, and 3 of another."""
    data = tmp_path / "hub" / "data"
    data.mkdir(parents=True)
    for number, (start, count) in enumerate([(0, 5), (5, 4), (9, 5)]):
        path = data / f"train-{number:05}-of-00003.parquet"
        parquet.write_table(table(start, count), path, row_group_size=2)
    parquet.write_table(table(20, 3), data / "validation-00000-of-00001.parquet")
    return tmp_path / "hub"


def opened(pattern, split="train", cache="", **fields):
    return open_source(f"parquet:{pattern}", split, image_size=8, cache=str(cache), fields=fields)


def test_rows_are_examples_and_row_groups_blocks(folder, tmp_path):
    source = opened(folder)
    assert [e["captions"] for e in source] == [[f"caption {k}", "b"] for k in range(14)]
    assert all(e["image"] == jpeg(k) for k, e in enumerate(source))
    assert source[6]["id"] == "train-00001-of-00003/1" and source[6]["label"] == -1
    assert block_bounds(source, 100).tolist() == [0, 2, 4, 5, 7, 9, 11, 13, 14]
    assert block_bounds(opened(folder, "train[3:10]"), 1).tolist() == [0, 1, 2, 4, 6, 7]
    assert len(opened(folder, "val")) == len(opened(folder, "validation")) == 3
    with pytest.raises(NoSplitError, match="no split 'test'; it has train, validation"):
        opened(folder, "test")
    files = f"{folder}/data/train-{{00000..00002}}-of-00003.parquet"
    assert list(opened(files)) == list(source)
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(again.__getitem__, [*range(14)] * 9)) == list(source) * 9


def test_a_row_group_is_decoded_once_and_kept_on_the_disk(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(source_of, "MEMORY", 0)
    monkeypatch.setattr(row_groups, "MEMORY", 0)
    monkeypatch.setattr(row_groups, "MAPPED", 2)
    decoded = []
    whole = source_of.ParquetSource._decode
    monkeypatch.setattr(
        source_of.ParquetSource,
        "_decode",
        lambda s, group: decoded.append(group) or whole(s, group),
    )
    source = opened(folder, cache=tmp_path / "cache")
    expected = list(source)
    shuffled = random.Random(0).sample([*range(14)] * 3, 42)
    assert [source[k] for k in shuffled] == [expected[k] for k in shuffled]
    assert len(decoded) == len(set(decoded)) == 8
    again = pickle.loads(pickle.dumps(source))
    assert list(again) == expected and len(decoded) == 8, "shared by processes and starts"
    captions = [again.without_image(k)["captions"] for k in range(14)]
    assert captions == [e["captions"] for e in expected] and not decoded[-1].image
    (kept,) = (tmp_path / "cache").glob("parquet-*/0")
    monkeypatch.setattr(row_groups, "_EVERY", 2)
    again._groups._budget = 3 * max(file.stat().st_size for file in kept.iterdir())
    for file in kept.iterdir():
        file.unlink()
    assert list(again) == expected
    assert sum(file.stat().st_size for file in kept.iterdir()) <= 4 * again._groups._budget / 3


def test_processes_of_a_machine_bound_their_own_row_groups(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(source_of, "MEMORY", 0)
    monkeypatch.setattr(row_groups, "_EVERY", 2)
    sources = []
    for _ in range(2):
        monkeypatch.setattr(row_groups, "_taken", {})  # as in another process
        sources.append(opened(folder, cache=tmp_path / "cache"))
    expected = list(sources[0])
    worker = pickle.loads(pickle.dumps(sources[1]))
    worker._groups._budget = 1
    assert list(worker) == expected
    first, second = (source._groups._folder for source in sources)
    assert worker._groups._folder == second, "workers share the folder of their parent"
    assert len(list(first.glob("*.arrow"))) == 8 > len(list(second.glob("*.arrow")))


def test_a_cache_that_cannot_be_written_costs_time_only(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(source_of, "MEMORY", 0)
    expected = list(opened(folder, cache=tmp_path / "cache"))
    (tmp_path / "file").touch()
    assert list(opened(folder, cache=tmp_path / "file" / "x")) == expected


def test_columns_are_found_or_chosen(tmp_path):
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    rows = {
        "jpg": [jpeg(k) for k in range(3)],
        "caption": ["one", " ", None],
        "alt": [["x", "y"], [], ["z"]],
        "label": [1, 0, None],
        "url": ["http://x/0", None, "http://x/2"],
    }
    made = pa.table(rows).replace_schema_metadata({"huggingface": json.dumps(names)})
    parquet.write_table(made, tmp_path / "t.parquet")
    source = opened(tmp_path / "t.parquet")
    assert [e["captions"] for e in source] == [["one"], [], []]
    assert [e["label"] for e in source] == [1, 0, -1] and source.class_names == ["cat", "dog"]
    assert source[0]["image"] == jpeg(0) and source[1]["id"] == "t/1"
    arguments = ("--tables", tmp_path / "t.parquet", "--image", "jpg")
    assert source[0]["id"] in read(build(tmp_path, "parquet", *arguments), "train")
    both = opened(tmp_path / "t.parquet", captions="caption:2+alt", id="caption")
    assert both[0]["captions"] == ["one", "x", "y"] and both[0]["weights"] == [2, 0.5, 0.5]
    assert both[0]["origins"] == [0, 1, 1]
    assert both[0]["id"] == "one"
    with pytest.raises(UserError, match="no column 'alt_text' for the field 'captions'"):
        opened(tmp_path / "t.parquet", captions="alt_text")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.parquet", "no such file or folder"),
        ("bomb.parquet", "decompresses to over 200 times its size"),
        ("broken.parquet", "cannot be read"),
        ("{t,other}.parquet", "other.parquet has no column 'image'"),
        ("other.parquet", "no column 'image' for the field 'image'; it has n"),
    ],
)
def test_mistakes_are_explained(tmp_path, monkeypatch, name, message):
    monkeypatch.setattr(source_of, "FREE_BYTES", 2**16)
    parquet.write_table(table(0, 2), tmp_path / "t.parquet")
    parquet.write_table(pa.table({"n": [1]}), tmp_path / "other.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    large = pa.table({"image": [bytes(2_000_000)]})
    path = tmp_path / "bomb.parquet"
    parquet.write_table(large, path, use_dictionary=False, compression="zstd")
    with pytest.raises(UserError) as raised:
        opened(tmp_path / name)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_footers_say_where_row_groups_lie():
    file = io.BytesIO()
    parquet.write_table(table(0, 9, label=[*range(9)]), file, row_group_size=2)
    data = file.getvalue()
    metadata = parquet.ParquetFile(file).metadata
    count = footer.size(data[-footer.TAIL :])
    found = footer.row_groups(data[-count - footer.TAIL : -footer.TAIL])
    for number, (start, stop) in enumerate(found):
        group = metadata.row_group(number)
        columns = [group.column(k) for k in range(group.num_columns)]
        assert start == min(c.dictionary_page_offset or c.data_page_offset for c in columns)
        assert stop - start == sum(c.total_compressed_size for c in columns)


@pytest.mark.slow
def test_damaged_files_are_read_or_refused(tmp_path):
    """Of 600 files with damaged bytes, each is read, refused, or an example is an error."""
    rng = random.Random(0)
    file = io.BytesIO()
    parquet.write_table(table(0, 6), file, row_group_size=2)
    whole, path = file.getvalue(), tmp_path / "t.parquet"
    count = footer.size(whole[-footer.TAIL :])
    errors = []
    for number in range(600):
        data = bytearray(whole)
        low = len(data) - count - footer.TAIL if number % 2 else 0
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(low, len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            for example in opened(path):
                assert isinstance(example["image"], bytes)
        except UserError as error:
            errors.append(str(error))
        try:
            tail = bytes(data[-footer.TAIL - count : -footer.TAIL])
            assert all(0 <= start <= stop for start, stop in footer.row_groups(tail))
        except ValueError:
            pass
    assert len(errors) > 100 and all("\n" not in error for error in errors)
