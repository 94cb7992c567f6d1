"""Corrupt, missing or forbidden files of a dataset raise an error of one or two lines."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cap_pretrain.data.pipeline import ImageOptions, train_dataset
from cap_pretrain.data.prefetch import iterate
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer, train_sentencepiece
from cap_pretrain.errors import UserError
from tests.data.test_sources import write

COUNT, SHARDS = 24, 3
BLOCK = 1 << 16  # ArrayRecord pads its output to this size


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """One dataset of three files with captions, and one with only images and labels."""
    from tensorflow_datasets import features as f

    root = tmp_path_factory.mktemp("data")
    captioned = {"image": f.Image(), "captions": f.Sequence(f.Text()), "id": f.Text()}
    sizes = {"train": COUNT, "val": SHARDS}
    write(
        root,
        "captioned",
        captioned,
        lambda i: {"captions": [f"{i} a", "b"], "id": f"{i}"},
        sizes,
        SHARDS,
    )
    labelled = {"image": f.Image(), "label": f.ClassLabel(names=["cat", "dog"])}
    write(root, "labelled", labelled, lambda i: {"label": i % 2})
    return root


@pytest.fixture
def folder(datasets, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(datasets / "captioned" / "1.0.0", tmp_path / "captioned"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_sentencepiece(
        [f"{i} a b" for i in range(COUNT)], tmp_path_factory.mktemp("tokenizer"), vocab_size=30
    )


def read(folder):
    return open_source(str(folder), "train", image_size=8)


def shard(folder, number=1):
    return folder / f"{folder.name}-train.array_record-{number:05}-of-{SHARDS:05}"


def flip(file, start, stop):
    content = bytearray(file.read_bytes())
    content[start:stop] = bytes(255 - byte for byte in content[start:stop])
    file.write_bytes(content)


def edit(folder, change):
    file = folder / "dataset_info.json"
    info = json.loads(file.read_text())
    change(info)
    file.write_text(json.dumps(info))


def forbid(file):
    """Make a file unreadable, even for root."""
    if os.geteuid():
        file.chmod(0)
    else:
        file.unlink()
        file.mkdir()


FEATURES = "features.json"
SECOND = "captioned-train.array_record-00001-of-00003"

DAMAGES = {
    "missing": (lambda d: shard(d).unlink(), f"{SECOND} is missing"),
    "nothing in it": (lambda d: shard(d).write_bytes(b""), f"{SECOND} cannot be read"),
    "nothing but zeros": (
        lambda d: shard(d).write_bytes(bytes(2 * BLOCK)),
        f"{SECOND} cannot be read (Corrupted",
    ),
    "short": (lambda d: os.truncate(shard(d), 100), f"{SECOND} cannot be read"),
    "without its end": (lambda d: os.truncate(shard(d), BLOCK), "read (it is truncated)"),
    "one byte short": (lambda d: os.truncate(shard(d), 2 * BLOCK - 1), "cannot be read"),
    "footer": (lambda d: flip(shard(d), BLOCK, BLOCK + 9), f"{SECOND} cannot be read"),
    "forbidden": (lambda d: forbid(shard(d)), f"{SECOND} cannot be read"),
    "of another dataset": (
        lambda d: shutil.copy(d / "captioned-val.array_record-00000-of-00003", shard(d)),
        f"{SECOND} holds 1 examples, but dataset_info.json says 8",
    ),
    "info says more": (
        lambda d: edit(d, lambda i: i["splits"][0].update(shardLengths=["8", "9", "8"])),
        f"{SECOND} holds 8 examples, but dataset_info.json says 9",
    ),
    "info is no number": (
        lambda d: edit(d, lambda i: i["splits"][0].update(shardLengths=["8", "x", "8"])),
        "invalid literal for int() with base 10: 'x'",
    ),
    "info is a list": (
        lambda d: (d / "dataset_info.json").write_text("[]"),
        "dataset_info.json or features.json cannot be read",
    ),
    "info breaks off": (
        lambda d: os.truncate(d / "dataset_info.json", 40),
        "dataset_info.json cannot be read (Unterminated string",
    ),
    "info is binary": (
        lambda d: (d / "dataset_info.json").write_bytes(b"\xff\x80"),
        "dataset_info.json cannot be read ('utf-8' codec",
    ),
    "info is missing": (
        lambda d: (d / "dataset_info.json").unlink(),
        "holds no dataset_info.json, so it is not a finished TFDS dataset",
    ),
    "features break off": (
        lambda d: os.truncate(d / FEATURES, 40),
        "features.json cannot be read (",
    ),
    "features are missing": (
        lambda d: (d / FEATURES).unlink(),
        "features.json cannot be read (No such file",
    ),
    "features are forbidden": (lambda d: forbid(d / FEATURES), "features.json cannot be read"),
    "features of an unknown kind": (
        lambda d: (d / FEATURES).write_text(
            (d / FEATURES).read_text().replace("text_feature.Text", "text_feature.Tex")
        ),
        "features.json names the class 'tensorflow_datasets.core.features.text_feature.Tex'",
    ),
    "features of an unknown type": (
        lambda d: (d / FEATURES).write_text(
            (d / FEATURES).read_text().replace('"uint8"', '"int3"')
        ),
        "dataset_info.json or features.json cannot be read",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_opening_a_damaged_file_reports_what_is_wrong(damage, said, folder, capfd):
    damage(folder)
    with pytest.raises(UserError) as raised:
        read(folder)
    message = str(raised.value)
    assert message.startswith(f"dataset {folder}: ") and said in message
    assert len(message.splitlines()) <= 2 and ("copy" in message or "tools/" in message)
    assert capfd.readouterr() == ("", "")


def test_examples_that_do_not_match_the_features(folder):
    text = (folder / FEATURES).read_text()
    (folder / FEATURES).write_text(text.replace('"captions"', '"capshons"'))
    with pytest.raises(UserError, match="split 'train': example 3 in .*-00000-.* cannot be read"):
        read(folder)[3]


def message_of(function, *args):
    """Return the message of the UserError that a call raises, or None."""
    try:
        function(*args)
    except UserError as error:
        return str(error)
    return None


def test_flipped_bytes_are_reported_or_harmless_but_never_read(folder):
    """Bytes that are not used may be flipped; others raise an error, wherever they are."""
    file = shard(folder)
    whole, expected = file.read_bytes(), list(read(folder))
    used = len(whole[:BLOCK].rstrip(b"\0"))
    errors = 0
    for start in [*range(0, used, used // 40), *range(BLOCK, 2 * BLOCK, BLOCK // 8)]:
        flip(file, start, start + 1)
        if message := message_of(read, folder):
            assert file.name in message
            errors += 1
        else:
            source = read(folder)
            for i, example in enumerate(expected):
                if message := message_of(source.__getitem__, i):
                    assert f"example {i} in {file.name} cannot be read (" in message
                    errors += 1
                else:
                    assert source[i] == example
        file.write_bytes(whole)
    assert errors > 30


@pytest.mark.parametrize("threads", [0, 2])
def test_a_file_that_is_emptied_while_it_is_read(threads, folder, model):
    source = read(folder)
    tokenizer = SentencePieceTokenizer(model, max_len=8)
    dataset = train_dataset([(source, 1.0)], tokenizer, ImageOptions(8), batch_size=4, seed=0)
    batches = iterate(dataset, threads=threads)
    for _ in range(COUNT):  # by now, all files are open
        next(batches)
    os.truncate(shard(folder), 0)
    with pytest.raises(UserError, match=f"{SECOND} cannot be read"):
        list(itertools.islice(batches, COUNT))
    batches.close()


def test_no_example_is_read_from_an_emptied_file(datasets, tmp_path):
    folder = Path(shutil.copytree(datasets / "labelled" / "1.0.0", tmp_path / "labelled"))
    source = read(folder)
    assert source[0]["label"] in (0, 1)
    for file in folder.glob("*-train.*"):
        os.truncate(file, 0)
    with pytest.raises(UserError, match="labelled-train.* cannot be read"):
        source[1]


_TRUNCATES_A_FILE_WHILE_READING = """
import os, sys
from cap_pretrain.data.pipeline import ImageOptions, train_dataset
from cap_pretrain.data.prefetch import iterate
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.data.text.tokenizers import SentencePieceTokenizer
from cap_pretrain.errors import UserError

def main():
    folder, file, model = sys.argv[1:]
    source = open_source(folder, "train", image_size=8)
    tokenizer = SentencePieceTokenizer(model, 8)
    dataset = train_dataset([(source, 1.0)], tokenizer, ImageOptions(64), batch_size=4, seed=0)
    batches = iterate(dataset, workers=2)
    try:
        while True:
            last = next(batches)
            if last["index"][0] == 0:
                os.truncate(file, 0)
    except UserError as error:
        print(error)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_worker_processes_leave_nothing_but_the_message(folder, model, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(_TRUNCATES_A_FILE_WHILE_READING)
    # Returns when all processes that hold a pipe have ended. Python then warns of any shared memory
    # that was not freed.
    done = subprocess.run(
        [sys.executable, program, folder, shard(folder), model],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    (message,) = done.stdout.splitlines()
    assert f"{SECOND} cannot be read" in message
