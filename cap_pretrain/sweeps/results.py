"""Results of the trials of a sweep: their progress, their metrics, and tables of these."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from cap_pretrain import files, inputs, learners
from cap_pretrain.checkpoints import load
from cap_pretrain.data.text import tokenizers
from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.optim import schedule
from cap_pretrain.sweeps.trials import Trial, record
from cap_pretrain.telemetry.metrics import read_metrics
from cap_pretrain.training import feed, plan
from cap_pretrain.training.phases import changes, phases_of
from cap_pretrain.training.step import split_learner

Row = dict[str, Any]

# How the values of a metric are reduced to one, by the suffix of its name: "val/loss:min".
REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "last": lambda values: values[-1],
    "min": min,
    "max": max,
}
# Runs that differ only in this field are averaged.
SEED = "seed"
COSTS_FILE = "costs.json"


class Status(NamedTuple):
    """The progress of a trial.

    `state` is waiting, running, finished, failed, stopped, or killed (recorded as running, but the
    sweep is not); begun or finished for a trial that was started by hand.
    """

    state: str
    step: int  # the last logged step; 0 before the first
    total: int  # steps of the whole run; 0 if unknown
    left_s: float | None  # seconds left from that step on; None if unknown
    reason: str  # why the trial failed or stopped


def status(trial: Trial, out: Path, running: bool) -> Status:
    """Return a trial's progress; `running`: whether its sweep is (see `runner.is_locked`)."""
    folder = out / trial.name
    recorded, lines = record(folder), read_metrics(folder)
    step, total = max((int(line["step"]) for line in lines), default=0), _total_steps(folder)
    by_hand = "finished" if total and step == total else "begun" if lines else "waiting"
    state = recorded.get("state", by_hand)
    if state == "running" and not running:
        state = "killed"
    etas = [line["time/eta_s"] for line in lines if line.get("time/eta_s") is not None]
    left = etas[-1] if etas and state != "finished" else None
    return Status(state, step, total, left, recorded.get("reason", ""))


def _total_steps(folder: Path) -> int:
    """Return the number of steps of a run, or 0 if it is unknown."""
    try:
        config = load.read_config(folder)
        in_epochs = not (config.total_steps or config.total_examples)
        if in_epochs and config.data.buckets:  # counting would read all captions
            return 0
        epoch = 0
        if in_epochs:
            mixture = feed.in_buckets(config, inputs.open_sources(config), None)
            epoch = feed.examples_an_epoch(config, mixture)
        batches = _batch_sizes(folder, config.batch_size)
        return schedule.make_schedule(config, epoch=epoch, batches=batches).total
    except UserError:  # the run has not written its config yet, or the data is not on this machine
        return 0


def _batch_sizes(folder: Path, size: int) -> schedule.BatchSizes:
    """Return the batch sizes of a run, whose config says `size`."""
    step, batches = load.read_batch_sizes(folder)
    return batches.then(step, size)


def rows(trials: Sequence[Trial], out: Path, metrics: Sequence[str]) -> list[Row]:
    """Return a row for each trial: its name, the fields in which trials differ, the metrics.

    `out` is the folder of the sweep. Metrics are names in metrics.jsonl, as "val/loss", optionally
    with ":min", ":max" or ":last", which is the default; "1-probe/top1" is the error of an
    accuracy. Raises UserError if no trial has one of them.
    """
    varying = _varying([trial.fields for trial in trials])
    lines = [read_metrics(out / trial.name) for trial in trials]
    names = {name for own in lines for line in own for name in line}
    found = []
    for trial, own in zip(trials, lines, strict=True):
        row = {"trial": trial.name} | {field: trial.fields.get(field) for field in varying}
        found.append(row | {metric: _value(own, metric, names) for metric in metrics})
    return found


def _varying(all_fields: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the fields whose values differ between trials."""
    names = dict.fromkeys(name for fields in all_fields for name in fields)
    return [n for n in names if any(f.get(n) != all_fields[0].get(n) for f in all_fields)]


def _value(lines: Sequence[Mapping[str, Any]], metric: str, names: set[str]) -> float | None:
    """Return the value of a metric, as `rows` takes it, in a run; None if the run has none."""
    name, _, reduction = metric.partition(":")
    if reduction and reduction not in REDUCTIONS:
        raise UserError(f"{metric}: {reduction!r} is none of {', '.join(REDUCTIONS)}.")
    is_error, name = name.startswith("1-"), name.removeprefix("1-")
    if name not in names:
        raise UserError(f"no trial has the metric {name!r}.{did_you_mean(name, names)}")
    values = [line[name] for line in lines if line.get(name) is not None]
    values = [1 - value for value in values] if is_error else values
    return REDUCTIONS[reduction or "last"](values) if values else None


def ordered(table: Sequence[Row], column: str) -> list[Row]:
    """Return rows sorted by a column, with "-" before its name descending; missing values last."""
    name = column.removeprefix("-")
    _check_column(table, name, "--sort")
    with_value = [row for row in table if row[name] is not None]
    without = [row for row in table if row[name] is None]
    return sorted(with_value, key=lambda row: row[name], reverse=name != column) + without


def pivot(table: Sequence[Row], down: str, across: str, metric: str) -> list[Row]:
    """Return a pivot table of one metric; trials that differ only in their seed are averaged.

    The values of the field `down` are rows, those of `across` columns. Other fields in which trials
    differ become columns before these, with a row for each combination of values, unless the two
    fields determine them. Raises UserError if there is no such column.
    """
    for field in (down, across):
        _check_column(table, field, "--pivot")
    others = [name for name in table[0] if name not in ("trial", metric, down, across, SEED)]
    places = {(row[down], row[across]) for row in table}
    fields = [n for n in others if len({(r[down], r[across], r[n]) for r in table}) > len(places)]
    fields.append(down)
    values = _sorted({row[across] for row in table})
    cells: dict[tuple, list[float]] = {}
    for row in table:
        if row[metric] is not None:
            cells.setdefault((*(row[f] for f in fields), row[across]), []).append(row[metric])
    keys = _sorted({tuple(row[f] for f in fields) for row in table})
    return [
        dict(zip(fields, key, strict=True))
        | {f"{across}={value}": _mean(cells.get((*key, value))) for value in values}
        for key in keys
    ]


def over(table: Sequence[Row], field: str, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Return rows of `rows` with trials that differ only in `field` as one row.

    Such a row has the other fields, the number of trials as "trials", and for each metric its mean,
    as "METRIC sd" its standard deviation (of a sample; None for fewer than two values) and as
    "METRIC n" the number of trials that have it. Raises UserError if there is no such field.
    """
    fields = [name for name in table[0] if name not in ("trial", *metrics)]
    if field not in fields:
        raise UserError(f"--over: trials do not differ in {field!r}.{did_you_mean(field, fields)}")
    kept = [name for name in fields if name != field]
    groups: dict[str, list[Row]] = {}
    for row in table:
        groups.setdefault(repr([row[name] for name in kept]), []).append(row)
    found = []
    for own in groups.values():
        row = {name: own[0][name] for name in kept} | {"trials": len(own)}
        for metric in metrics:
            values = [r[metric] for r in own if r[metric] is not None]
            row[metric] = _mean(values)
            row[f"{metric} sd"] = statistics.stdev(values) if len(values) > 1 else None
            row[f"{metric} n"] = len(values)
        found.append(row)
    return found


def _sorted(values: set) -> list:
    """Sort values, by their repr if they cannot be compared, such as None with numbers."""
    try:
        return sorted(values)
    except TypeError:
        return sorted(values, key=repr)


def _mean(values: Sequence[float] | None) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _check_column(table: Sequence[Row], name: str, flag: str) -> None:
    if name not in table[0]:
        raise UserError(f"{flag}: there is no column {name!r}.{did_you_mean(name, table[0])}")


def costs(folder: Path) -> dict[str, float]:
    """Return what a run has cost, for the x axis of a plot; counts are cached in its folder.

    The keys are `parameters` and `parameters/PART`; `examples` seen so far, repeated ones counted
    again; `flops` of training on them, as in `training.plan`. Raises UserError if the run has not
    started.
    """
    path = folder / COSTS_FILE
    if not path.exists():
        files.write_text(path, json.dumps(_count(folder), indent=2) + "\n")
    counted = files.read_json(path)
    steps = max((line["step"] for line in read_metrics(folder)), default=0)
    batches = _batch_sizes(folder, counted.pop("batch_size"))
    examples = batches.examples(steps)
    spent = examples * counted.pop("flops_per_example")
    if phases := counted.pop("phases", []):
        spent = plan.flops_until(phases, lambda step: batches.examples(min(step, steps)))
    return counted | {"examples": examples, "flops": spent}


def _count(folder: Path) -> dict[str, float]:
    """Count parameters and FLOPs from the config of a run."""
    config = load.read_config(folder)
    path = inputs.tokenizer_path(folder)
    tokenizer = inputs.open_tokenizer(config, path) if path.exists() else tokenizers.NoText()
    size = tokenizer.vocab_size
    learner = nnx.eval_shape(lambda: learners.build(config, size, jax.random.key(0)))
    parameters = plan.count_parameters(split_learner(learner)[1])
    parts = {f"parameters/{part}": n for part, n in parameters.items() if part != "total"}
    phases = phases_of(config, _total_steps(folder)) if changes(config) else []
    flops = [plan.flops_per_example(phase.config, size)["training"] for phase in phases]
    return {
        "parameters": parameters["total"],
        **parts,
        "flops_per_example": plan.flops_per_example(config, size)["training"],
        "phases": plan.described(phases, flops),
        "batch_size": config.batch_size,
    }
