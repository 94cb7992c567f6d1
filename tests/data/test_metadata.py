"""The metadata of stored datasets: no code of theirs runs, and what is malformed is told."""

import copy
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from cap_pretrain.data.sources.open import open_source
from cap_pretrain.errors import UserError
from tests import memory
from tests.data.test_sources import write

INFO, FEATURES = "dataset_info.json", "features.json"
PAYLOAD = 'import pathlib\npathlib.Path("PWNED").write_text("")\nclass Foo: pass\n'
TEXT = "tensorflow_datasets.core.features.text_feature.Text"


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A dataset with an image, captions, a text and a label."""
    from tensorflow_datasets import features as f

    features = {
        "image": f.Image(),
        "captions": f.Sequence(f.Text()),
        "id": f.Text(),
        "label": f.ClassLabel(names=["cat", "dog"]),
    }
    root = tmp_path_factory.mktemp("data")
    return write(root, "d", features, lambda i: {"captions": ["a"], "id": str(i), "label": i % 2})


@pytest.fixture
def evil(stored, tmp_path, monkeypatch):
    """A copy at evil/1.0.0 below the working directory, whose modules can be imported."""
    folder = Path(shutil.copytree(stored, tmp_path / "evil" / "1.0.0"))
    for place in (tmp_path / "evil", folder):
        (place / "payload.py").write_text(PAYLOAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def edit(folder, file, change):
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))


def read(folder):
    source = open_source(str(folder), "train", image_size=8)
    return [source[i] for i in range(min(len(source), 2))]


def set_id(feature):
    return lambda values: values["featuresDict"]["features"].update(id=feature)


def legacy(name, content):
    return {"type": f"tensorflow_datasets.core.features.{name}", "content": content}


FOO = "evil.payload.Foo"
INNER = json.dumps({"feature": {"type": FOO, "content": {}}, "length": None})
CODE = {
    "its class": (FEATURES, set_id({"pythonClassName": FOO, "text": {}})),
    "other spelling": (FEATURES, set_id({"python_class_name": FOO, "text": {}})),
    "inside a sequence": (
        FEATURES,
        set_id(
            {
                "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
                "jsonFeature": {"json": INNER},
            }
        ),
    ),
    "old form": (FEATURES, lambda v: (v.clear(), v.update(type=FOO, content={}))),
    "inside the old form": (
        FEATURES,
        lambda v: (
            v.clear(),
            v.update(legacy("features_dict.FeaturesDict", {"a": {"type": FOO, "content": {}}})),
        ),
    ),
    "in the other file": (
        INFO,
        lambda v: v.update(features={"pythonClassName": FOO, "text": {}}),
    ),
    "of the library": (
        FEATURES,
        set_id({"pythonClassName": "tensorflow_datasets.testing.Foo", "text": {}}),
    ),
}


@pytest.mark.parametrize("case", CODE)
def test_only_known_classes_are_imported(case, evil):
    file, change = CODE[case]
    edit(evil, file, change)
    before = set(sys.modules)
    with pytest.raises(UserError, match=f"{file} names the class .*Foo.* was not imported"):
        read("evil")
    assert not Path("PWNED").exists()
    assert not [m for m in set(sys.modules) - before if m.startswith(("evil", "tensorflow_data"))]


def test_the_module_of_a_dataset_is_not_imported(evil):
    edit(evil, INFO, lambda v: v.update(moduleName="evil.payload"))
    assert len(read(evil)) == 2
    assert not Path("PWNED").exists() and "evil.payload" not in sys.modules


OLD_FEATURES = legacy(
    "features_dict.FeaturesDict",
    {
        "image": legacy(
            "image_feature.Image",
            {"shape": [None, None, 3], "dtype": "uint8", "encoding_format": None},
        ),
        "captions": legacy(
            "sequence_feature.Sequence",
            {"feature": legacy("text_feature.Text", {}), "length": None},
        ),
        "id": legacy("text_feature.Text", {}),
        "label": legacy("class_label_feature.ClassLabel", {"num_classes": 2}),
    },
)


def test_features_of_old_versions_are_read(stored, evil):
    (evil / FEATURES).write_text(json.dumps(OLD_FEATURES))
    assert read(evil) == read(stored)


def first_split(**values):
    return lambda info: info["splits"][0].update(values)


def label(**values):
    def change(features):
        features["featuresDict"]["features"]["label"]["classLabel"] = values

    return change


MALFORMED = {
    "negative": (INFO, first_split(shardLengths=["-1"]), "has -1 examples"),
    "more than there can be": (INFO, first_split(shardLengths=[str(2**62)]), "examples"),
    "outside": (INFO, first_split(filepathTemplate="../{SPLIT}"), "leads out of the folder"),
    "unprintable": (INFO, first_split(filepathTemplate="x\nerror: fine {SPLIT}"), "not printable"),
    "absolute": (INFO, first_split(filepathTemplate="/etc/passwd"), "leads out of the folder"),
    "a format": (INFO, first_split(filepathTemplate="{SPLIT:>99999999999}"), "not a template"),
    "line feed": (INFO, first_split(name="train\nfoo"), "name of a split is too long or not"),
    "classes": (FEATURES, label(numClasses=str(10**15)), "has 1000000000000000 classes"),
    "a list": (FEATURES, lambda v: v.update(featuresDict=[1]), "cannot be read"),
    "not a dictionary": (
        FEATURES,
        lambda v: (v.clear(), v.update(pythonClassName=TEXT, text={})),
        "cannot be read",
    ),
    "no format": (INFO, lambda v: v.pop("fileFormat"), ""),
    "no such format": (INFO, lambda v: v.update(fileFormat="exe"), "exe"),
    "files": (INFO, first_split(shardLengths=["1"] * 40000), "has 40000 files"),
    "too large": (INFO, lambda v: v.update(description="a" * 2**22), "over 4194304 bytes"),
    "many splits": (
        INFO,
        lambda v: v.update(splits=[v["splits"][0] | {"name": f"s{i}"} for i in range(999)]),
        "s19 (10), ….",
    ),
    "version": (INFO, lambda v: v.update(version="../.."), "cannot be read"),
}


def test_an_empty_split_does_not_hide_the_others(evil):
    def empty(info):
        info["splits"].append({"name": "test"})

    edit(evil, INFO, empty)
    assert len(read(evil))


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_metadata_is_told(case, evil):
    file, change, said = MALFORMED[case]
    edit(evil, file, change)
    with pytest.raises(UserError) as raised:
        read(evil)
    message = str(raised.value)
    assert said in message and message.startswith(f"dataset {evil}: ")
    assert len(message.splitlines()) <= 2


@pytest.mark.parametrize("file", [FEATURES, "label.labels.txt"])
def test_metadata_that_is_no_file(file, evil):
    (evil / file).unlink()
    os.mkfifo(evil / file)
    with pytest.raises(UserError, match=f"{file} cannot be read .not a regular file"):
        read(evil)


def test_labels_beyond_the_classes(evil):
    edit(evil, FEATURES, label(numClasses="1"))
    (evil / "label.labels.txt").write_text("cat\n")
    with pytest.raises(UserError, match="cannot be read .its label is 1 of 1 classes"):
        list(open_source(str(evil), "train", image_size=8))


def test_records_that_are_no_file(evil):
    (shard,) = evil.glob("*-train.*")
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match="train.* cannot be read .it is not a file"):
        read(evil)


def test_parquet_is_read_whole_or_refused(evil):
    """TFDS reads Parquet without regard to parts of splits."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = open_source(str(evil), "train", image_size=8)._records
    table = pa.table({"data": [records[i] for i in range(len(records))]})
    (shard,) = evil.glob("*-train.*")
    path = evil / shard.name.replace("array_record", "parquet")
    pq.write_table(table, path)
    expected = read(evil)
    edit(evil, INFO, lambda v: v.update(fileFormat="parquet"))
    assert read(evil) == expected
    with pytest.raises(UserError, match="has 3 examples, but TFDS reads 10 from parquet"):
        open_source(str(evil), "train[:3]", image_size=8)
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match="parquet cannot be read"):
        read(evil)
    path.unlink()
    with pytest.raises(UserError, match="parquet-.* is missing"):
        read(evil)


def test_building_leaves_no_temporary_folder(tmp_path, monkeypatch):
    from cap_pretrain.data.builders.base import ImageDataset

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(ImageDataset, "splits", lambda self: {})
    (tmp_path / "temporary").mkdir()
    ImageDataset("d", tmp_path / "out", origin="nothing")
    assert not list((tmp_path / "temporary").iterdir())


NASTY = [
    *(None, True, -1, 0, 2**31, 2**63, 10**30, 1e308, float("nan"), "", "-1", "99999999999", "NaN"),
    *("../../x", "/dev/zero", "gs://b/x", "http://x/y", "a" * 300, "a\nb", "\0", "\ud800", "é"),
    *([], {}, [[]], [None], {"a": {}}, "{}", "[[", FOO, TEXT, INNER, "{SPLIT:>9999999999}"),
    *(
        {"pythonClassName": FOO},
        {"type": FOO, "content": {}},
        {"json": INNER},
        {"names_file": "/x"},
    ),
    *(
        "tensorflow_datasets.core.features.audio_feature.Audio",
        "os.system",
        "array_record",
        "tfrecord",
    ),
]
KEYS = [
    "type",
    "content",
    "pythonClassName",
    "features",
    "text",
    "tensor",
    "json",
    "name",
    "jsonFeature",
]


def places(value):
    """Yield (container, key) of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def damage(rng, values):
    """Return JSON in which one to three places were changed at random."""
    for _ in range(rng.randint(1, 3)):
        found = [*places(values)] or [(values, "features")]
        leaves = [(inner, k) for inner, k in found if not isinstance(inner[k], dict | list)]
        container, key = rng.choice(leaves if leaves and rng.random() < 0.5 else found)
        change = rng.randrange(8) % 5 % 4
        if change == 0:
            container[key] = copy.deepcopy(rng.choice(NASTY))
        elif change == 1 and isinstance(container, dict):
            container[rng.choice(KEYS)] = container.pop(key)
        elif change == 2 and isinstance(container, list):
            container.insert(0, copy.deepcopy(container[key]))
        elif isinstance(container, dict):
            others = [*NASTY, *(inner[k] for inner, k in places(values))]
            container[rng.choice(KEYS)] = copy.deepcopy(rng.choice(others))
        else:
            del container[key]
    text = bytearray(json.dumps(values).encode())
    if rng.random() < 0.1:
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text)


def tree(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.name not in (INFO, FEATURES)}


@pytest.mark.slow
def test_any_metadata_is_read_or_refused(evil, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rng = random.Random(0)
    info, features = (json.loads((evil / name).read_text()) for name in (INFO, FEATURES))
    read(evil)
    before, files = set(sys.modules), tree(tmp_path)
    with memory.below(2**20):
        outcomes, longest = [0, 0], 0
        for _ in range(2500):
            for name, values in ((INFO, info), (FEATURES, rng.choice([features, OLD_FEATURES]))):
                data = damage(rng, copy.deepcopy(values)) if rng.random() < 0.6 else None
                (evil / name).write_bytes(data or json.dumps(values).encode())
            try:
                read(evil)
                outcomes[0] += 1
            except UserError as error:
                outcomes[1] += 1
                longest = max(longest, len(str(error).splitlines()))
        assert min(outcomes) > 100 and longest <= 2
        assert tree(tmp_path) == files
        imported = [sys.modules[name] for name in set(sys.modules) - before]
        assert not [m for m in imported if str(tmp_path) in str(getattr(m, "__file__", ""))]
