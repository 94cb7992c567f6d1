"""Phases of a run: where they begin, what their batches are, and exact resume across a change."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from cap_pretrain import inputs, train
from cap_pretrain.data import resolution, views
from cap_pretrain.errors import UserError
from cap_pretrain.reports import sections, workdir
from cap_pretrain.sweeps import results
from cap_pretrain.training import feed, plan, programs, watch
from cap_pretrain.training.phases import phases_of
from cap_pretrain.training.step import split_learner
from cap_pretrain.validation import validate
from tests import layouts, quick, toy
from tests.test_train import sigterm_in, vocab_size

STEPS = 6
QUICK = (quick.NAME, {}, {"optim__ema": 0.9})
CAPPA = (
    "captioner",
    {"parallel_fraction": 0.75},
    {
        **{"model__dropout": 0.2, "optim__ema": 0.9, "model__depth": 1},
        **{"model__keep_tokens": 0.5, "model__keep_tokens_until": 0.9},  # but for the last step
        **{"model__width": 32, "model__mlp": 64, "model__decoder_depth": 1},
    },
)
ROTATION = ("rotation", {}, {"model__depth": 1, "optim__lr": 1e-3, "accumulate": 2})


def make_config(case, tokenizer_path, first_sizes="8:0.5", **fields):
    learner, options, more = case
    common = dict(text__tokenizer=str(tokenizer_path), total_steps=STEPS, log__ids=True)
    c = toy.config(learner, options, **common | more | fields)
    c.data.first_sizes = first_sizes
    return c


def spans(c, total=10):
    return [(p.start, p.stop, p.changed) for p in phases_of(c, total)]


def side(pixels):
    return {resolution.FIELD: f"{pixels}:1" if pixels else ""}


def test_shares_of_the_run_become_ranges_of_steps(monkeypatch):
    c = toy.config()
    (only,) = phases_of(c, 10)
    assert only.config is c and (only.start, only.stop, only.changed) == (0, 10, {})
    assert spans(c, 0) == [(0, 0, {})]  # a run that only evaluates
    c.data.first_sizes = "8:0.7+24:0.2"
    assert spans(c) == [(0, 7, side(8)), (7, 9, side(24)), (9, 10, side(0))]
    assert [resolution.training_side(p.config) for p in phases_of(c, 10)] == [8, 24, 16]
    assert resolution.training_side(c) == 16
    assert spans(c, 3) == [(0, 2, side(8)), (2, 3, side(24))]  # the last phase has no step
    # A learner's own changes are merged with those of the size.
    at_first, later = {"learner.width": 3}, {"learner.width": 4, "model.dropout": 0.5}
    found = [(0.9, later), (0.0, at_first)]
    monkeypatch.setattr(quick.Quick, "changes", lambda config: found, raising=False)
    c = toy.config(quick.NAME)
    assert c.learner.width == 4
    assert spans(c) == [(0, 9, at_first), (9, 10, {"model.dropout": 0.5})]
    assert phases_of(c, 10)[1].config.model.dropout == 0.5 and c.model.dropout == 0
    c.data.first_sizes = "8:0.5"
    assert spans(c) == [
        (0, 5, side(8) | at_first),
        (5, 9, side(0) | at_first),
        (9, 10, side(0) | {"model.dropout": 0.5}),
    ]
    assert phases_of(c, 10)[0].describe() == "images of 8 px, learner.width=3"
    # What changes parameters is a mistake of the learner, found before a step.
    graphdef, params, stats = split_learner(
        jax.eval_shape(lambda: programs.learners.build(c, 100, jax.random.key(0)))
    )
    state = toy.abstract_state(c, 100).replace(params=params, stats=stats)
    with pytest.raises(ValueError, match=r"learner.width=3: changes the parameters"):
        programs.programs_of(phases_of(c, 10), lambda *_: None, 100, graphdef, state)


def test_tokens_are_dropped_up_to_a_share_of_the_run():
    whole = {"model.keep_tokens": 1.0}
    c = toy.config(model__keep_tokens=0.5)
    assert spans(c) == [(0, 10, {})]
    c.model.keep_tokens_until = 0.8
    assert spans(c) == [(0, 8, {}), (8, 10, whole)]
    assert phases_of(c, 10)[1].describe() == "images of 16 px, model.keep_tokens=1.0"
    c.data.first_sizes = "8:0.6"
    assert spans(c) == [(0, 6, side(8)), (6, 8, side(0)), (8, 10, side(0) | whole)]
    c.model.keep_tokens = 1.0
    assert len(spans(c)) == 2


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        ("8", "mu/8", "data.first_sizes: '8' in '8' is not SIDE:SHARE"),
        ("8:0.5+x:0.1", "mu/8", "'x:0.1' in"),
        ("8:nan", "mu/8", "is not SIDE:SHARE"),
        ("-8:0.5", "mu/8", "is not SIDE:SHARE"),
        ("8:0.9+16:0.1", "mu/8", "add up to 1 or more; leave a part"),
        ("12:0.5", "mu/8", "data.first_sizes: 12 is not a multiple of the patch size 8"),
        ("16:0.5", "alexnet", "data.first_sizes: 16 is too small for alexnet"),
        ("16:0.5", "stored", "data.first_sizes: '16:0.5' needs images"),
    ],
)
def test_mistakes_are_told(text, model, message):
    c = toy.config("classifier" if model == "stored" else "rotation", data__first_sizes=text)
    c.model.name, c.data.image_size = model, 64 if model == "alexnet" else 16
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        validate(c)


def test_sizes_change_no_example_and_no_text(tokenizer_path):
    """And a smaller image is the resized image of the final size, of which scenes are drawn."""
    c = toy.config(data__image_size=24)
    tokenizer = inputs.open_tokenizer(c, tokenizer_path)
    mixture = feed.in_buckets(c, inputs.open_sources(c), tokenizer)

    def batches(text, offset=0):
        c.data.first_sizes = text
        args = (c, mixture, tokenizer, range(2, 8), range(1, 5), offset)
        read = feed.prepared_batches(*args, phases_of(c, 5))
        found = list(read)
        read.close()
        return found

    plain, phased = batches("", 3), batches("8:0.4+32:0.2", 3)
    assert [len(batch["image"][0]) for batch in phased] == [8, 32, 24, 24]
    for a, b in zip(plain, phased, strict=True):
        for name in ("text", "index", "label", "broken"):
            np.testing.assert_array_equal(a[name], b[name])
    np.testing.assert_array_equal(plain[3]["image"], phased[3]["image"])
    source, index = mixture[0][0], phased[0]["index"][0]
    drawn = views.square(source[index]["image"], 8, "none")
    np.testing.assert_array_equal(phased[0]["image"][0], drawn)


def test_the_plan_sums_over_phases(tmp_path):
    c = toy.config("rotation", data__first_sizes="8:0.6", data__image_size=32, model__depth=1)
    kwargs = {"total_steps": 10, "make_optimizer": lambda _: optax.identity()}
    made = plan.make_plan(c, vocab_size=0, **kwargs)
    lines = plan.write_plan(made, tmp_path).splitlines()
    assert any(line.startswith("steps 1 to 6, images of 8 px  ") for line in lines)
    c.data.first_sizes = ""
    large = plan.flops_per_example(c, 0)
    assert made["flops_per_example"]["forward"] == large["forward"]
    first, last = made["phases"]
    assert (first["start"], first["stop"], last["stop"]) == (0, 6, 10)
    assert last["training"] == large["training"] > 2 * first["training"]
    mean = 0.6 * first["training"] + 0.4 * last["training"]
    assert made["flops_per_example"]["training"] == pytest.approx(mean)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tokenizer_path):
    """Workdirs of uninterrupted runs, by case."""
    workdirs = {}

    def of(case):
        if case[0] not in workdirs:
            workdirs[case[0]] = tmp_path_factory.mktemp(case[0])
            train.run(make_config(case, tokenizer_path), workdirs[case[0]])
        return workdirs[case[0]]

    return of


def figures(folder):
    """What was logged, without times."""
    return [
        {k: v for k, v in line.items() if not k.startswith("time/")}
        for line in toy.lines(folder)
        if "train/loss" in line or "data/ids" in line
    ]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("case", "stop"),
    [
        pytest.param(QUICK, 3, id="quick-at-the-change"),
        pytest.param(QUICK, 4, id="quick-after-it", marks=SLOW),
        pytest.param(CAPPA, 2, id="cappa-before-it", marks=SLOW),
    ],
)
def test_a_run_goes_on_exactly_across_a_change(
    case, stop, straight, tokenizer_path, tmp_path, monkeypatch, capsys
):
    config, whole = make_config(case, tokenizer_path), straight(case)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        sigterm_in(stop, patch)
        with pytest.raises(watch.Stopped):
            train.run(config, tmp_path)
    began = "From step 4 on: images of 16 px"
    assert (began in capsys.readouterr().out) == (stop > 3)
    train.run(config, tmp_path)
    said = capsys.readouterr().out
    assert f"Resuming from step {stop}." in said and (began in said) == (stop < 3)
    assert figures(tmp_path) == figures(whole) and figures(whole)[-1]["step"] == STEPS
    states = [toy.saved_state(config, w, vocab_size(w), STEPS) for w in (whole, tmp_path)]
    toy.assert_same(*states)


def test_the_ids_are_those_of_a_run_of_one_size(straight, tokenizer_path, tmp_path):
    train.run(make_config(QUICK, tokenizer_path, first_sizes=""), tmp_path)
    ids, plain = (
        [line["data/ids"] for line in toy.lines(w) if "data/ids" in line]
        for w in (straight(QUICK), tmp_path)
    )
    assert ids == plain and len(ids) == STEPS
    losses, others = toy.losses(straight(QUICK)), toy.losses(tmp_path)
    assert losses[0]["train/loss"] != others[0]["train/loss"]


def test_reports_and_sweeps_count_the_flops_of_each_phase(straight, tokenizer_path):
    c = make_config(QUICK, tokenizer_path)
    size = vocab_size(straight(QUICK))
    phases = phases_of(c, STEPS)
    counted = 3 * c.batch_size * sum(plan.training_flops(phases, size))
    assert counted > 0
    run = workdir.read(straight(QUICK), "run")
    assert sections.costs(run)["training FLOPs"] == pytest.approx(counted)
    assert "steps 1 to 3: images of 8 px" in str(sections.facts([run]))
    assert results.costs(straight(QUICK))["flops"] == pytest.approx(counted)


def losses_of(folder, layout):
    c = make_config(ROTATION, "")
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = layouts.LAYOUTS[layout]
    train.run(c, Path(folder))
    return [line["train/loss"] for line in toy.losses(Path(folder))]


@pytest.mark.slow
def test_eight_devices_compute_the_same_across_a_change(tmp_path):
    one = losses_of(str(tmp_path / "one"), "one")
    (eight,) = layouts.on_eight_devices(losses_of, [(str(tmp_path / "eight"), "all")])
    np.testing.assert_allclose(eight, one, rtol=1e-4)
    assert len(one) == STEPS
