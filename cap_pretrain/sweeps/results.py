"""What came of the trials of a sweep: how far each is, their figures, and tables of them."""

import json
import math
from collections.abc import Mapping, Sequence
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
from cap_pretrain.training import plan
from cap_pretrain.training.step import split_learner

Row = dict[str, Any]

# Which of the values of a figure counts, written after it: "val/loss:min".
TAKEN = {"last": lambda values: values[-1], "min": min, "max": max}
# Runs that differ in this alone are averaged.
SEED = "seed"
COSTS_FILE = "costs.json"


class Status(NamedTuple):
    """How far a trial is.

    Attributes:
      state: waiting, running, finished, failed, stopped, or killed (it was running, but is not);
        of one that was started by hand begun, or finished.
      step: the last that was logged; 0 before the first.
      total: steps of the whole run; 0 if that is not known.
      left_s: seconds that it will take from that step on; None if that is not known.
      reason: why it failed or stopped.
    """

    state: str
    step: int
    total: int
    left_s: float | None
    reason: str


def status(trial: Trial, out: Path, running: bool) -> Status:
    """How far a trial is. `running` says whether somebody runs the sweep."""
    folder = out / trial.name
    told, lines = record(folder), read_metrics(folder)
    step, total = max((int(line["step"]) for line in lines), default=0), _total_steps(folder)
    by_hand = "finished" if total and step == total else "begun" if lines else "waiting"
    state = told.get("state", by_hand)
    if state == "running" and not running:
        state = "killed"
    etas = [line["time/eta_s"] for line in lines if line.get("time/eta_s") is not None]
    left = etas[-1] if etas and state != "finished" else None
    return Status(state, step, total, left, told.get("reason", ""))


def _total_steps(folder: Path) -> int:
    try:
        config = load.read_config(folder)
        in_epochs = not (config.total_steps or config.total_examples)
        if in_epochs and config.data.buckets:  # which takes reading all captions
            return 0
        epoch = inputs.examples_an_epoch(config, inputs.open_sources(config)) if in_epochs else 0
        return schedule.duration(config, "total", batch_size=config.batch_size, epoch=epoch)
    except UserError:  # it has not got as far as to leave its config, or its data is not here
        return 0


def rows(trials: Sequence[Trial], out: Path, figures: Sequence[str]) -> list[Row]:
    """A row for each trial: its name, the fields in which trials differ, the figures.

    Args:
      trials: which.
      out: the folder of the sweep.
      figures: of metrics.jsonl, as "val/loss", with ":min", ":max" or ":last", which is the
        default; "1-probe/top1" is what an accuracy lacks.

    Raises:
      UserError: no trial has a figure.
    """
    varying = _varying([trial.fields for trial in trials])
    lines = [read_metrics(out / trial.name) for trial in trials]
    there = {name for own in lines for line in own for name in line}
    found = []
    for trial, own in zip(trials, lines, strict=True):
        row = {"trial": trial.name} | {field: trial.fields.get(field) for field in varying}
        found.append(row | {figure: _figure(own, figure, there) for figure in figures})
    return found


def _varying(all_fields: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for fields in all_fields for name in fields)
    return [n for n in names if any(f.get(n) != all_fields[0].get(n) for f in all_fields)]


def _figure(lines: Sequence[Mapping[str, Any]], figure: str, there: set[str]) -> float | None:
    name, _, taken = figure.partition(":")
    if taken and taken not in TAKEN:
        raise UserError(f"{figure}: {taken!r} is none of {', '.join(TAKEN)}.")
    is_error, name = name.startswith("1-"), name.removeprefix("1-")
    if name not in there:
        raise UserError(f"none of the trials has the figure {name!r}.{did_you_mean(name, there)}")
    values = [line[name] for line in lines if line.get(name) is not None]
    values = [1 - value for value in values] if is_error else values
    return TAKEN[taken or "last"](values) if values else None


def ordered(table: Sequence[Row], column: str) -> list[Row]:
    """Rows by the value of a column, ascending, or with "-" before its name descending.

    Rows without a value come last. Raises UserError if there is no such column.
    """
    name = column.removeprefix("-")
    _check_column(table, name, "--sort")
    with_value = [row for row in table if row[name] is not None]
    without = [row for row in table if row[name] is None]
    return sorted(with_value, key=lambda row: row[name], reverse=name != column) + without


def pivot(table: Sequence[Row], down: str, across: str, figure: str) -> list[Row]:
    """One figure with the values of a field down and those of another across.

    Other fields in which trials differ are columns before, a row for each combination, unless these
    two settle them. Trials that differ in their seed alone are averaged.

    Raises:
      UserError: there is no such column.
    """
    for field in (down, across):
        _check_column(table, field, "--pivot")
    others = [name for name in table[0] if name not in ("trial", figure, down, across, SEED)]
    places = {(row[down], row[across]) for row in table}
    fields = [n for n in others if len({(r[down], r[across], r[n]) for r in table}) > len(places)]
    fields.append(down)
    values = _sorted({row[across] for row in table})
    cells: dict[tuple, list[float]] = {}
    for row in table:
        if row[figure] is not None:
            cells.setdefault((*(row[f] for f in fields), row[across]), []).append(row[figure])
    keys = _sorted({tuple(row[f] for f in fields) for row in table})
    return [
        dict(zip(fields, key, strict=True))
        | {f"{across}={value}": _mean(cells.get((*key, value))) for value in values}
        for key in keys
    ]


def _sorted(values: set) -> list:
    """Ascending; what cannot be compared, as None with numbers, by how it is written."""
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
    """What a run took, by what may be on the x axis of a plot.

    Returns:
      `parameters` and `parameters/PART`; `examples` that were seen so far, repeated ones counted
      again; `flops` of training on them, counted as the plan does.

    Raises:
      UserError: the run has not begun.
    """
    path = folder / COSTS_FILE
    if not path.exists():
        files.write_text(path, json.dumps(_counted(folder), indent=2) + "\n")
    counted = files.read_json(path)
    steps = max((line["step"] for line in read_metrics(folder)), default=0)
    examples = steps * counted.pop("batch_size")
    return counted | {"examples": examples, "flops": examples * counted.pop("flops_per_example")}


def _counted(folder: Path) -> dict[str, float]:
    config = load.read_config(folder)
    path = inputs.tokenizer_path(folder)
    tokenizer = inputs.open_tokenizer(config, path) if path.exists() else tokenizers.NoText()
    size = tokenizer.vocab_size
    learner = nnx.eval_shape(lambda: learners.build(config, size, jax.random.key(0)))
    parameters = plan.count_parameters(split_learner(learner)[1])
    parts = {f"parameters/{part}": n for part, n in parameters.items() if part != "total"}
    flops = plan.flops_per_example(config, size)["training"]
    return {
        "parameters": parameters["total"],
        **parts,
        "flops_per_example": flops,
        "batch_size": config.batch_size,
    }
