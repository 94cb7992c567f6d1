"""Progress is counted in examples, so a run may resume with another batch size."""

import itertools
import json
import random

import numpy as np
import pytest
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import evals, inputs, train
from cap_pretrain.checkpoints.load import read_batch_sizes
from cap_pretrain.checkpoints.manifest import CorruptCheckpointError, make_manifest
from cap_pretrain.checkpoints.stored import saved_batches
from cap_pretrain.data.text.tokenizers import NoText
from cap_pretrain.errors import UserError
from cap_pretrain.optim import schedule
from cap_pretrain.optim.schedule import BatchSizes
from cap_pretrain.training import changes, feed
from cap_pretrain.validation import validate
from tests import toy


def random_sizes(rng):
    """Return random batch sizes of a run and the step up to which they are known."""
    sizes, step = BatchSizes(()), 0
    for _ in range(rng.randint(1, 5)):
        sizes, step = sizes.then(step, rng.choice([1, 3, 8, 12, 64])), step + rng.randint(0, 30)
    return sizes, step


def test_no_row_of_a_run_is_skipped_or_repeated():
    rng = random.Random(0)
    for _ in range(2000):
        sizes, last = random_sizes(rng)
        assert sizes.examples(0) == 0 and sizes.sizes[0][0] == 0
        steps = sorted({0, last, *(step for step, _ in sizes.sizes)})
        for known in steps[1:]:
            # As the run knew them, from each start on.
            own = BatchSizes(tuple(entry for entry in sizes.sizes if entry[0] < known))
            size = own.sizes[-1][1]
            assert own.offset + known * size == own.examples(known) == sizes.examples(known)
        seen = sizes.examples(last)
        assert sizes.steps(seen) == pytest.approx(last)
        part = rng.uniform(0, seen)
        assert sizes.examples(int(sizes.steps(part))) <= part + 1e-6


def test_examples_of_an_epoch_are_seen_once_across_a_change():
    c = toy.config("rotation", batch_size=8, data__scenes__length_train=60)
    mixture = inputs.open_sources(c)
    sizes, seen, rows = BatchSizes(()), [], []
    for (start, size), stop in zip([(0, 8), (3, 12), (7, 5)], (3, 7, 17), strict=True):
        c.batch_size, sizes = size, sizes.then(start, size)
        for part in (None, range(1, size, 2)):
            args = (c, mixture, NoText(), part, sizes.offset)
            batches = feed.training_batches(*args)
            drawn = [batches[step]["index"] for step in range(start, stop)]
            (rows if part else seen).extend(np.concatenate(drawn))
    epoch = np.asarray(seen)
    assert len(epoch) == sizes.examples(17) == 24 + 48 + 50
    assert sorted(epoch[:60]) == sorted(epoch[60:120]) == list(range(60))
    assert len(rows) == 3 * 4 + 4 * 6 + 10 * 2


@pytest.mark.parametrize("unit", ["epochs", "examples", "steps"])
def test_the_rate_goes_on_where_it_was(unit):
    length = {"epochs": 10.0, "examples": 6000, "steps": 750}[unit]
    rng = random.Random(1)
    for warmup in ({"warmup_share": 0.1}, {"warmup_steps": 75}, {"warmup_examples": 600}):
        for _ in range(8):
            c = toy.config(total_steps=0, batch_size=8, optim__warmup_share=0.0)
            c.update_from_flattened_dict({f"total_{unit}": length})
            c.optim.update(warmup)
            before = schedule.make_schedule(c, epoch=600)
            step = rng.choice([1, 40, 80, 300, 749])
            sizes = BatchSizes(((0, 8),)).then(step, rng.choice([3, 12, 64]))
            rates = [float(schedule.learning_rate(c, before)(s)) for s in (step - 1, step)]
            c.batch_size = sizes.sizes[-1][1]
            after = schedule.make_schedule(c, epoch=600, batches=sizes)
            rate = schedule.learning_rate(c, after)
            peak = step > 76  # the warm-up is over, and does not begin again
            # From the first new step on, up to what one step may change.
            slope = 1e-3 * max(1, c.batch_size / 8) * (0.014 if not peak else 0.004)
            assert abs(float(rate(step)) - rates[1]) <= slope, (warmup, step, c.batch_size)
            assert float(rate(after.total)) <= 1e-3 * c.batch_size / 400
            seen = sizes.examples(after.total)
            assert after.total >= step
            if unit == "steps":
                assert after.total == 750
            else:
                assert 6000 <= seen < 6000 + max(8, c.batch_size)


def stored(workdir, c, *, step=13, batches=None):
    """Write what a start finds of a run at a step, without its state."""
    folder = workdir / "checkpoints" / str(step) / "manifest"
    folder.mkdir(parents=True)
    manifest = make_manifest(step, {}, {}, batches or ())
    (folder / "metadata").write_text(json.dumps(manifest))
    (workdir / "config.json").write_text(configs.to_json(c))


def of_epochs(**fields):
    c = toy.config("rotation", total_steps=0, data__scenes__length_train=60, **fields)
    c.total_epochs = 4.0
    c.model.update(dict(width=16, depth=1, mlp=32))
    return c


@pytest.mark.parametrize("batches", [None, [[0, 8]]], ids=["older", "newer"])
def test_a_change_is_worked_out_and_said(batches, tmp_path):
    c = of_epochs(batch_size=8)
    stored(tmp_path, c, batches=batches)
    assert read_batch_sizes(tmp_path) == (13, BatchSizes(((0, 8),)))
    c.batch_size, c.seed = 12, 1
    said = train.dry_run(c, tmp_path, ["batch_size", "seed"]).splitlines()
    assert said[:2] == ["batch_size was 8, is now 12", "seed was 0, is now 1"]
    assert said[2].startswith("seed changes the order of the examples: this epoch may repeat some")
    assert said[3] == (
        "104 examples (1.73 epochs) are seen; 12 more steps of 12 make 248 (4.13 epochs). "
        "Batch size: 8 from step 0, 12 from step 13; data continue with the next example, the "
        "learning rate is a function of examples."
    )
    assert json.loads((tmp_path / "plan.json").read_text())["total_steps"] == 25
    c.batch_size, c.seed, c.total_epochs = 8, 0, 1.0
    with pytest.raises(UserError, match="would end at step 8, but has reached step 13"):
        train.dry_run(c, tmp_path, ["total_epochs"])


def test_batches_of_one_length_keep_their_size(tokenizer_path, tmp_path):
    c = toy.config("recurrent", text__tokenizer=str(tokenizer_path), data__buckets=True)
    stored(tmp_path, c, step=1, batches=[[0, 8]])
    c.batch_size = 4
    with pytest.raises(UserError, match="batch_size: was 8, is now 4, but with data.buckets"):
        train.dry_run(c, tmp_path, ["batch_size"])


@pytest.mark.slow
def test_lanes_keep_their_number_and_divide_every_batch_size(tmp_path):
    c = of_epochs(batch_size=8, data__order="blocks", data__lanes=4)
    stored(tmp_path, c, batches=[[0, 8]])
    c.batch_size = 12
    said = train.dry_run(c, tmp_path, ["batch_size"])
    assert "Batch size: 8 from step 0, 12 from step 13" in said
    assert "Order: blocks of 256, 4 lanes, windows of 1 blocks." in said
    c.batch_size, c.data.lanes = 8, 2
    with pytest.raises(UserError, match="data.lanes was 4, is now 2"):
        train.dry_run(c, tmp_path)
    assert "data.lanes changes the order" in train.dry_run(c, tmp_path, ["data.lanes"])
    c.batch_size, c.data.lanes = 20, 5
    with pytest.raises(UserError, match=r"data.lanes: 5 do not .*\(8 from step 0, 20 from step 13"):
        train.dry_run(c, tmp_path, ["batch_size", "data.lanes"])
    c.data.lanes = 8
    with pytest.raises(UserError, match="data.lanes: 8 lanes do not divide batch_size=20"):
        train.dry_run(c, tmp_path, ["batch_size", "data.lanes"])


def test_a_run_that_began_before_there_were_blocks_keeps_its_order(tmp_path):
    c = of_epochs(batch_size=8)
    stored(tmp_path, c)
    before = json.loads((tmp_path / "config.json").read_text())
    for field in ("order", "block", "lanes", "cache_gb"):
        del before["data"][field]
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert "changes the order" not in train.dry_run(c, tmp_path)
    assert changes.with_earlier_order(c, tmp_path / "config.json").data.order == "global"
    c.data.order = "blocks"
    with pytest.raises(UserError, match="data.order was 'global', is now 'blocks'"):
        train.dry_run(c, tmp_path)


def test_evaluations_have_no_order(tmp_path):
    c = of_epochs(batch_size=6)
    c.total_epochs, c.encoder, c.evals = 0, "runs/cap", ConfigDict({"val": evals.defaults("loss")})
    c.data.order, c.data.lanes = "blocks", 4  # of the run that is evaluated
    validate(c)
    before = json.loads(configs.to_json(c))
    before["data"] |= {"order": "global", "lanes": 0}
    (tmp_path / "config.json").write_text(json.dumps(before))
    assert not changes.check_unchanged(c, tmp_path / "config.json")


def test_batch_sizes_that_no_run_wrote(tmp_path):
    rng, valid = random.Random(0), 0
    good, odd = [0, 1, 8, 12], [-1, 2.5, "8", None, True, [], {}, 10**400]

    def number():
        return rng.choice(good if rng.random() < 0.9 else odd)

    for trial in range(300):
        pairs = [[number() for _ in range(rng.choice([2, 2, 2, 1, 3]))] for _ in "ab"]
        workdir = tmp_path / str(trial)
        stored(workdir, toy.config() if not trial else ConfigDict(), batches=pairs)
        try:
            found = saved_batches(workdir, 13)
        except CorruptCheckpointError:
            continue
        assert found[0][0] == 0
        for (step, size), (then, _) in itertools.pairwise([*found, (10**401, 0)]):
            assert step < then and size >= 1
        valid += 1
    assert valid > 5


@pytest.mark.slow
def test_a_run_goes_on_with_another_batch_size(tmp_path, capsys):
    c = of_epochs(batch_size=8, eval__every_share=0.0, checkpoint__every_steps=4)
    c.total_epochs = 1.7
    c.evals = ConfigDict({"val": evals.defaults("loss", batch_size=20)})
    train.run(c, tmp_path)
    c.batch_size, c.total_epochs = 12, 4.0
    train.run(c, tmp_path, ["batch_size", "total_epochs"])
    assert "12 more steps of 12 make 248 (4.13 epochs). Batch size: 8" in capsys.readouterr().out
    assert read_batch_sizes(tmp_path) == (25, BatchSizes(((0, 8), (13, 12))))
    table = (tmp_path / "evals" / "table.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in table[1:]] == [["13", "1.733"], ["25", "4.133"]]
    rates = [line["train/learning_rate"] for line in toy.losses(tmp_path)]
    assert rates[13] > rates[-1] and 0 <= rates[-1] < 1e-4
    train.run(c, tmp_path)
    assert "Already at step 25 of 25: nothing to do." in capsys.readouterr().out
