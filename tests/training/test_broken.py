"""Examples that do not decode: listed by name and reason; too many end the run."""

import json

import numpy as np
import pytest

from cap_pretrain import inputs, train
from cap_pretrain.data.pipeline import ImageOptions, train_dataset
from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.text.tokenizers import NoText
from cap_pretrain.errors import UserError
from cap_pretrain.training import broken, watch
from cap_pretrain.training.broken import BrokenList
from tests import toy
from tests.data.numbers import Numbers, rows_of_host

MIXTURE = [(Numbers(20, broken=(3, 4)), 1.0), (Numbers(12, 100, broken=(0,)), 1.0)]


def listed(workdir, host=0):
    name = f"broken.{host}.jsonl" if host else "broken.jsonl"
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def batches(count=20, host=0, hosts=1):
    rows = rows_of_host(host, hosts, 4)
    dataset = train_dataset(MIXTURE, NoText(), ImageOptions(8), batch_size=4, seed=0, rows=rows)
    return [dataset[t] for t in range(count)]


def see(workdir, batches, host=0):
    seen = BrokenList(inputs.view(toy.config()), [source for source, _ in MIXTURE], workdir, host)
    for step, batch in enumerate(batches, 1):
        seen.see(step, batch)


def test_each_is_listed_once_when_it_first_comes(tmp_path):
    drawn = batches()
    see(tmp_path, drawn)
    lines = listed(tmp_path)
    assert {(line["index"], line["id"]) for line in lines} == {(3, "3"), (4, "4"), (0, "100")}
    for line in lines:
        position = line["index"] + (20 if line["id"] == "100" else 0)
        came = [step for step, batch in enumerate(drawn, 1) if position in batch["index"]]
        assert line["step"] == came[0] and len(came) > 1
        assert line["reason"] == "not an image" and line["dataset"] == "dataset 'numbers'"
    # A run that goes on, after a kill that tore the last line.
    path = tmp_path / "broken.jsonl"
    path.write_text(path.read_text()[:-9])
    see(tmp_path, drawn)
    assert listed(tmp_path) == lines


def test_hosts_list_their_own(tmp_path):
    for host in range(2):
        see(tmp_path, batches(3, host, 2), host)
    both = listed(tmp_path) + listed(tmp_path, 1)
    see(tmp_path, batches(3), host=9)
    assert sorted(b["id"] for b in both) == sorted(b["id"] for b in listed(tmp_path, 9)) != []


def test_the_list_has_an_end_and_whole_data_none(tmp_path, monkeypatch):
    whole = [batch | {"broken": np.zeros(4, bool)} for batch in batches()]
    see(tmp_path, whole)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(broken, "LIMIT", 2)
    see(tmp_path, batches())
    assert len(listed(tmp_path)) == 2


@pytest.mark.slow
def test_a_run_ends_saved_and_goes_on_when_more_may_be_broken(tmp_path, monkeypatch):
    example = Scenes.__getitem__

    def broken_half(self, index):
        return example(self, index) | ({"image": b"broken"} if index % 2 else {})

    monkeypatch.setattr(Scenes, "__getitem__", broken_half)
    monkeypatch.setattr(watch, "BROKEN_WINDOW", 24)
    c = toy.config(total_steps=8, data__max_broken=0.4, checkpoint__every_steps=99)
    with pytest.raises(UserError, match="of the last 24 examples did not decode.*max_broken=0.4"):
        train.run(c, tmp_path)
    (saved,) = (int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
    last = toy.lines(tmp_path)[-1]
    assert saved == last["step"] < 8
    assert len(listed(tmp_path)) == last["data/broken"]
    c.data.max_broken = 1.0
    train.run(c, tmp_path)
    assert toy.lines(tmp_path)[-1]["step"] == 8
    assert all(line["id"] and line["reason"] == "not an image" for line in listed(tmp_path))
