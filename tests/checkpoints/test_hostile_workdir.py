"""Files of a workdir may come from strangers: they are read, or refused in a line or two."""

import copy
import json
import os
import random

import pytest

from cap_pretrain import config as configs
from cap_pretrain.checkpoints import manifest as manifests
from cap_pretrain.checkpoints.load import load_learner, read_config
from cap_pretrain.checkpoints.manifest import CorruptCheckpointError
from cap_pretrain.errors import UserError
from cap_pretrain.evals.suite import newest_result
from cap_pretrain.telemetry.metrics import read_metrics
from cap_pretrain.training.broken import _lines
from cap_pretrain.training.changes import check_unchanged
from tests import toy

JUNK = (None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x", "../x", [], {}, [[1]], {"a": {}})
DEEP = "[" * 100_000 + "]" * 100_000
EVALS = ("loss", "few_shot", "captions")


def mutated(value, rng):
    """Return a copy of a JSON value with one to three places replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and rng.random() < 0.8:
                place = place[key]
                continue
            kind = rng.random()
            if kind < 0.15:
                del place[key]
            elif kind < 0.25 and isinstance(place, dict):
                place[f"{key}_more"] = rng.choice(JUNK)
            else:
                place[key] = copy.deepcopy(rng.choice(JUNK))
            break
    return value


def is_short(error):
    return len(str(error).splitlines()) < 3 and len(str(error)) < 1000


def many(default, slow):
    """Parametrize by the number of inputs: few by default, thousands among the slow tests."""
    return pytest.mark.parametrize("count", [default, pytest.param(slow, marks=pytest.mark.slow)])


@many(60, 2000)
def test_a_config_is_read_or_refused(count, tmp_path):
    rng = random.Random(count)
    c = toy.config(optim__ema=0.9)
    with c.unlocked():
        c.evals = {name: {"evaluator": name, "when": "end"} for name in EVALS}
    valid, path = json.loads(configs.to_json(c)), tmp_path / "config.json"
    path.write_text(json.dumps(valid))
    assert read_config(tmp_path).optim.ema == 0.9
    refused = []
    for _ in range(count):
        path.write_text(json.dumps(mutated(valid, rng)))
        for read in (lambda: read_config(tmp_path), lambda: check_unchanged(c, path, ["all"])):
            try:
                read()
            except UserError as error:
                refused.append(error)
    assert len(refused) > count / 4
    assert all(is_short(error) and str(path) in str(error) for error in refused)


@pytest.mark.parametrize("field", ["model.width", "model.depth", "data.image_size", "text.length"])
def test_a_config_of_any_size_costs_nothing(field, tokenizer_path, tmp_path):
    c = toy.config(model__depth=1)
    toy.saved_run(c, tmp_path, tokenizer_path, 3)
    stored = json.loads((tmp_path / "config.json").read_text())
    section, name = field.split(".")
    for value in (7, 10**6, 10**15):
        stored[section][name] = value
        (tmp_path / "config.json").write_text(json.dumps(stored))
        with pytest.raises(UserError) as error:
            load_learner(tmp_path)
        assert is_short(error.value)


@many(300, 5000)
def test_a_manifest_is_read_or_corrupt(count, tmp_path):
    rng = random.Random(count)
    leaf = {"shape": [2, 3], "dtype": "float32", "fingerprint": 7}
    valid = manifests.make_manifest(4, {"t.model": "abc"}, {"learner/a": leaf, "optimizer/b": leaf})
    path = tmp_path / "4" / "manifest" / "metadata"
    path.parent.mkdir(parents=True)
    refused = []
    for number in range(count):
        found = mutated(valid, rng) if number else valid
        if isinstance(found, dict) and rng.random() < 0.9:  # the checksum is no secret
            found.pop("checksum", None)
            found["checksum"] = manifests._checksum(found)
        path.write_text(json.dumps(found))
        try:
            read = manifests.read_manifest(tmp_path / "4")
        except CorruptCheckpointError as error:
            refused.append(error)
            continue
        for entry in read["leaves"].values():
            assert manifests.format_leaf(entry)
        manifests.compare(tmp_path / "4", read["leaves"], read["leaves"])
    assert count > len(refused) > count / 4 and all(map(is_short, refused))


@many(300, 5000)
def test_logs_keep_only_lines_as_they_are_written(count, tmp_path):
    rng = random.Random(count)
    valid = {"step": 3, "train/loss": 0.5, "val/loss": None}
    broken = {"step": 1, "dataset": "d", "index": 4, "id": "x", "reason": "why"}
    lines = [json.dumps(mutated(rng.choice([valid, broken]), rng)) for _ in range(count)]
    lines += [*map(json.dumps, JUNK), DEEP, '{"step": ' + "9" * 400 + "}", '{"step": 3, "tr']
    lines += [rng.randbytes(9).decode("latin-1").replace("\n", "") for _ in range(count)]
    rng.shuffle(lines)
    text = "\n".join([json.dumps(valid), *lines, json.dumps(broken)])
    for name in ("metrics.jsonl", "broken.jsonl"):
        (tmp_path / name).write_text(text, "utf-8")
    found = read_metrics(tmp_path)
    assert found[0] == valid
    assert max(line["step"] for line in found) < 2**54 and all(len(line) for line in found)
    listed = _lines(tmp_path / "broken.jsonl")
    assert listed[-1] == broken and {(line["dataset"], line["index"]) for line in listed}


@pytest.mark.parametrize("content", [DEEP, "[]", "3", "", "\x00", '{"a": ', None])
def test_what_is_no_json_object_is_refused(content, tmp_path):
    """None is a FIFO, which would block."""
    folder = tmp_path / "evals" / "val"
    folder.mkdir(parents=True)
    (folder / "notes.json").write_text("of a person")
    assert newest_result(tmp_path, "val") == (None, {})
    paths = [tmp_path / "config.json", folder / "7.json"]
    for path in paths:
        os.mkfifo(path) if content is None else path.write_text(content)
    for read in (lambda: read_config(tmp_path), lambda: newest_result(tmp_path, "val")):
        with pytest.raises(UserError) as error:
            read()
        assert is_short(error.value) and str(tmp_path) in str(error.value)
