"""Samples of whole blocks from a few places, and passes over everything that are not repeated."""

import io

import numpy as np
import pytest

from cap_pretrain.data.sources import buckets, passes, subset
from cap_pretrain.data.sources.base import block_bounds
from cap_pretrain.data.sources.open import open_source
from cap_pretrain.data.text.tokenizers import source_captions
from cap_pretrain.telemetry import console
from tests.data.test_webdataset import sample, tar
from tests.tools.test_build_dataset import jpeg


class Stored:
    """`count` examples in files of `per_file`, which counts what is read and announced."""

    class_names: list[str] = []

    def __init__(self, count=30_000, per_file=1000):
        self._count, self._per_file = count, per_file
        self.read, self.announced = [], []

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        self.read.append(index)
        return {"captions": [f"{index}"], "label": index % 3, "id": "", "image": b""}

    def block_bounds(self, size):
        starts = range(0, self._count, self._per_file)
        cuts = [np.arange(s, min(s + self._per_file, self._count), size) for s in starts]
        return np.append(np.concatenate(cuts), self._count)

    def read_ahead(self, ranges):
        self.announced += ranges


def test_a_sample_is_whole_blocks_of_a_few_files():
    source = Stored(300_000)
    found = [int(caption) for caption in source_captions(source, 3000, 256)]
    assert len(found) == len(set(found)) == 3000 and found == sorted(found)
    assert len({index // 1000 for index in found}) <= passes.SPOTS
    assert source.read == [k for start, stop in source.announced for k in range(start, stop)]
    blocks = np.searchsorted(source.block_bounds(256), found, side="right")
    assert len(set(blocks.tolist())) <= passes.SPOTS
    # Without blocks it is as before.
    assert list(source_captions(Stored(10), 3)) == ["0", "3", "6"]


@pytest.mark.parametrize("seed", range(20))
def test_samples_of_any_blocks_are_ascending_and_not_too_many(seed):
    rng = np.random.default_rng(seed)
    bounds = np.concatenate([[0], np.cumsum(rng.integers(1, 500, rng.integers(1, 200)))])
    count = int(rng.integers(1, bounds[-1] + 1))
    runs = passes.sample_runs(bounds, count)
    flat = [index for start, stop in runs for index in range(start, stop)]
    assert flat == sorted(set(flat)) and 0.5 * count <= len(flat) <= count
    assert {start for start, _ in runs} <= set(bounds.tolist())


def test_a_pass_over_everything_announces_blocks_and_shows_how_far_it_is():
    source, stream = Stored(2000), io.StringIO()
    with console.used(stream) as shown:
        done = []
        shown.advance = lambda *args: done.append(args)
        assert subset.labels_of(source).tolist() == [k % 3 for k in range(2000)]
    assert "Reading the labels of 2,000 examples" in stream.getvalue()
    assert done[-1] == (2000, 2000) and len(done) == 8
    assert sorted(source.read) == [*range(2000)]
    assert {k for run in source.announced for k in range(*run)} == set(range(2000))


def test_the_answer_is_kept_in_the_cache_of_the_dataset(tmp_path, monkeypatch):
    members = [m for k in range(6) for m in sample(f"{k}", jpeg(k), "a b"[: 1 + k % 3])]
    tar(tmp_path / "t.tar", members)
    name, options = f"wds:{tmp_path / 't.tar'}", {"image_size": 8, "cache": str(tmp_path / "cache")}
    source = open_source(name, "train", **options)

    class Tokenizer:
        pad_id, eos_id, max_len, vocab_size, identity = 0, 1, 8, 100, "x"

        def encode(self, text):
            return np.pad([*map(ord, text), 1], (0, 7 - len(text)))

    def pairs():
        return [
            (group.length, len(group)) for group in buckets.by_length(source, Tokenizer())
        ], subset.labels_of(subset.divided(source, 2)[0]).tolist()

    first = pairs()
    monkeypatch.setattr(type(source), "_read", None)  # reading would fail
    source = open_source(name, "train", **options)
    assert pairs() == first
    assert block_bounds(source, 4).tolist() == [0, 4, 6]
    tar(tmp_path / "t.tar", [*members, *sample("7", jpeg(7), "c")])
    source = open_source(name, "train", **options)
    with pytest.raises(Exception, match="not callable"):
        pairs()
