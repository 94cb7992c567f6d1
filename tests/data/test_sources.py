import io
import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from cap_pretrain.data.sources.base import DEFAULT_FIELDS, parse_mixture
from cap_pretrain.data.sources.open import find_dataset, open_source
from cap_pretrain.errors import UserError

SIZES = {"train": 10, "val": 3}


def png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 6, 3), i, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write(data_dir, name: str, features, example, sizes=SIZES, shards=1):
    """Write a TFDS dataset whose example i of a split is `example(i)`, and return its folder."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(size) for split, size in sizes.items()}

        def _generate_examples(self, size):
            for i in range(size):
                yield i, {**example(i), "image": io.BytesIO(png(i))}

    Builder.name = name
    builder = Builder(data_dir=data_dir)
    builder.download_and_prepare(
        file_format="array_record", download_config=tfds.download.DownloadConfig(num_shards=shards)
    )
    return data_dir / name / "1.0.0"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Three datasets that store captions differently: flat, nested_captions, one_caption."""
    from tensorflow_datasets import features as f

    root = tmp_path_factory.mktemp("data")
    flat = {
        "image": f.Image(),
        "captions": f.Sequence(f.Text()),
        "id": f.Text(),
        "label": f.ClassLabel(names=["cat", "dog"]),
    }
    write(
        root,
        "flat",
        flat,
        lambda i: {"captions": [f"caption {i}", "naïve Ü"], "id": f"id{i}", "label": i % 2},
    )
    nested = {"image": f.Image(), "captions": f.Sequence({"text": f.Text(), "id": np.int64})}
    write(
        root,
        "nested_captions",
        nested,
        lambda i: {"captions": [{"text": f"a{i}", "id": i}, {"text": f"b{i}", "id": i}]},
    )
    single = {"image": f.Image(), "meta": {"text": f.Text(), "number": np.int64}}
    write(root, "one_caption", single, lambda i: {"meta": {"text": f"only {i}", "number": 7 * i}})
    return root


def read(name, split="train", **options):
    return open_source(str(name), split, image_size=8, **options)


def test_records_are_as_stored(data_dir):
    source = read(data_dir / "flat")
    assert len(source) == 10 and source.class_names == ["cat", "dog"]
    seen = set()
    for example in source:
        i = int(example["id"].removeprefix("id"))
        seen.add(i)
        assert example == {
            "image": png(i),
            "captions": [f"caption {i}", "naïve Ü"],
            "label": i % 2,
            "id": f"id{i}",
            "question": "",
        }
    assert seen == set(range(10))


@pytest.mark.parametrize(
    ("name", "fields", "plain"),
    [
        ("flat", {}, True),
        ("nested_captions", {"captions": "captions/text"}, True),
        ("one_caption", {"captions": "meta/text"}, True),
        ("one_caption", {"captions": "meta/text", "id": "meta/number"}, False),
    ],
)
def test_records_are_as_tfds_reads_them(data_dir, name, fields, plain):
    source = read(data_dir / name, fields=fields)
    assert source._plain is plain, "read without TFDS's parser"
    examples = list(source)
    source._plain = False
    assert list(source) == examples


def test_a_path_may_stop_at_any_level_and_a_name_is_looked_up(data_dir):
    version = data_dir / "flat" / "1.0.0"
    expected = read(version)[4]
    assert read(data_dir / "flat")[4] == expected
    for name in ("flat", "flat:1.0.0", "flat/1.0.0"):
        assert read(name, data_dir=str(data_dir))[4] == expected


def test_the_newest_of_several_versions_is_read_and_a_single_config(data_dir, tmp_path):
    for version in ("1.0.0", "9.0.0", "10.0.0"):
        folder = tmp_path / "flat" / "config" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").touch()
    assert find_dataset(str(tmp_path / "flat")).name == "10.0.0"
    (tmp_path / "flat" / "other" / "1.0.0").mkdir(parents=True)
    (tmp_path / "flat" / "other" / "1.0.0" / "dataset_info.json").touch()
    with pytest.raises(UserError, match="config, other"):
        find_dataset(str(tmp_path / "flat"))


def test_split_syntax_and_aliases(data_dir):
    path = data_dir / "flat"
    everything = [e["id"] for e in read(path)]
    assert [e["id"] for e in read(path, "train[:30%]")] == everything[:3]
    assert [e["id"] for e in read(path, "train[3:]")] == everything[3:]
    assert len(read(path, "train+validation")) == 13
    assert [e["id"] for e in read(path, "validation")] == [e["id"] for e in read(path, "val")]
    assert len(read(path, "validation[:2]")) == 2


def test_fields_can_be_elsewhere(data_dir):
    nested = read(data_dir / "nested_captions", fields={"captions": "captions/text"})
    assert all(e["captions"][0][1:] == e["captions"][1][1:] for e in nested)
    assert sorted(e["captions"][0] for e in nested) == [f"a{i}" for i in range(10)]

    # Default features may be missing; only features that are named explicitly must exist.
    fields = {"image": "image", "captions": "captions/text", "label": "label", "id": "id"}
    assert {e["label"] for e in read(data_dir / "nested_captions", fields=fields)} == {-1}

    fields = {"captions": "meta/text", "id": "meta/number", "label": "meta/number"}
    for example in read(data_dir / "one_caption", fields=fields):
        i = int(example["id"]) // 7
        assert example["captions"] == [f"only {i}"] and example["label"] == 7 * i


def test_captions_of_several_fields_have_weights(tmp_path):
    from tensorflow_datasets import features as f

    features = {"image": f.Image(), "caption": f.Text(), "more": f.Sequence(f.Text())}
    folder = write(
        tmp_path,
        "several",
        features,
        lambda i: {"caption": ["one", " "][i % 2], "more": ["two", "", "three"]},
    )
    both = {
        tuple(e["captions"]): (e["weights"], e["origins"])
        for e in read(folder, fields={"captions": "caption:3 + more"})
    }
    assert both == {
        ("one", "two", "three"): ([3.0, 0.5, 0.5], [0, 1, 1]),
        ("two", "three"): ([0.5, 0.5], [1, 1]),
    }
    one = read(folder, fields={"captions": "more"})[0]
    assert one["captions"] == ["two", "", "three"] and "weights" not in one
    with pytest.raises(UserError, match="no feature 'moor' for the field 'captions'"):
        read(folder, fields={"captions": "caption+moor"})
    with pytest.raises(UserError, match="data.fields.captions 'caption:0.more'.*must be > 0"):
        read(folder, fields={"captions": "caption:0+more"})


def test_what_a_dataset_lacks_has_a_neutral_value(data_dir):
    source = read(data_dir / "one_caption")
    assert source.class_names == []
    neutral = {"captions": [], "label": -1, "id": "3", "question": ""}
    assert source[3] == {"image": source[3]["image"], **neutral}


def test_a_pickled_source_reads_the_same_and_carries_no_data(data_dir):
    source = read(data_dir / "flat", "train[5:]", fields={"id": "id"})
    pickled = pickle.dumps(source)
    copy = pickle.loads(pickled)
    assert len(pickled) < 1000
    assert len(copy) == 5 and all(copy[i] == source[i] for i in range(5))


def test_an_index_out_of_range_is_an_index_error(data_dir):
    for index in (-1, 10):
        with pytest.raises(IndexError):
            read(data_dir / "flat")[index]


def test_tensorflow_stays_out(data_dir):
    read(data_dir / "flat")[0]
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("flat", "trian", {}, r"no split 'trian'.*train \(10\), val \(3\)"),
        ("flat", "train[:900%", {}, r"split 'train\[:900%' is not valid"),
        ("flat", "train[:0]", {}, r"split 'train\[:0\]' is empty"),
        ("flatt", "train", {}, "Did you mean 'flat'"),
        ("scene", "train", {}, "Did you mean 'scenes'"),
        ("./nowhere", "train", {}, "no such folder"),
        ("flat", "train", {"fields": {"captions": "text"}}, "'text'.*captions, id, image, label"),
        ("flat", "train", {"fields": {"caption": "text"}}, "Did you mean 'captions'"),
        ("nested_captions", "train", {"fields": {"captions": "captions"}}, "captions/text"),
        ("one_caption", "train", {"fields": {"image": "picture"}}, "'picture'.*meta/text"),
    ],
)
def test_errors_have_at_most_two_lines(data_dir, name, split, options, message):
    with pytest.raises(UserError, match=message) as error:
        read(name, split, data_dir=str(data_dir), **options)
    assert str(error.value).count("\n") <= 1


def copy_of(folder, tmp_path):
    import shutil

    return shutil.copytree(folder, tmp_path / "copy")


def test_a_format_without_random_access_is_refused_with_the_way_out(data_dir, tmp_path):
    folder = copy_of(data_dir / "flat" / "1.0.0", tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match="tfrecord.*\n.*convert_format"):
        read(folder)


def test_missing_files_and_unreadable_metadata_raise(data_dir, tmp_path):
    folder = copy_of(data_dir / "flat" / "1.0.0", tmp_path)
    next(folder.glob("*train.array_record*")).unlink()
    assert len(read(folder, "val")) == 3
    with pytest.raises(UserError, match="flat-train.array_record-00000-of-00001 is missing"):
        read(folder)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read(folder)


def test_a_folder_without_a_dataset_raises(tmp_path):
    (tmp_path / "image.jpg").touch()
    with pytest.raises(UserError, match="no dataset_info.json.*\n.*build_dataset"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("a", 1.0)]),
        ("a:0.2+b:0.8", [("a", 0.2), ("b", 0.8)]),
        ("a + b:3", [("a", 1.0), ("b", 3.0)]),
        ("coco_captions:1.1.0", [("coco_captions:1.1.0", 1.0)]),
        ("coco/2014:1.1.0:2e-1", [("coco/2014:1.1.0", 0.2)]),
        ("/data/a:b/c:0.5", [("/data/a:b/c", 0.5)]),
    ],
)
def test_mixtures(text, expected):
    assert parse_mixture(text) == expected


@pytest.mark.parametrize("text", ["", "a+", ":0.5", "a:0", "a:-1+b", "a:nan", "a:inf"])
def test_impossible_mixtures_are_refused(text):
    with pytest.raises(UserError, match="data.name"):
        parse_mixture(text)


def test_default_fields_are_those_the_builders_write():
    assert {k: k for k in ("image", "captions", "label", "id", "question")} == DEFAULT_FIELDS
