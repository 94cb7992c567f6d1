"""Curves of runs, thinned so that a page stays small, and the figures at their end."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from cap_pretrain.reports.workdir import SPIKE, Run, finite

POINTS = 1000
"""Points of a curve at most, about two for each pixel of a wide chart's width."""

ALL_POINTS = 60_000
"""Points of all curves of a page at most: about 1.2 MB of JSON."""

LOWER = re.compile("loss$|perplexity|bits_per_|mean_rank|error$|cross_entropy$")
"""Metrics of which less is better, by their last word."""

HIGHER = re.compile(
    "accuracy|top[15]|_r(1|5|10)(_|$)|Bleu|CIDEr|METEOR|ROUGE|SPICE|likelihood|cosine"
)
"""Metrics of which more is better, by their last word."""

UNRANKED = re.compile("unigram|chance|_std$")
"""Metrics that are only there to compare others with."""

Points = tuple[list[int], list[float | None]]
"""Steps, ascending, and values; None is a value that is not finite."""


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve of a chart: `run` is the index of its run, `metric` the name in metrics.jsonl."""

    run: int
    metric: str
    points: Points


@dataclasses.dataclass
class Chart:
    """A chart of curves; `logs` says whether a logarithmic axis may help, `group` where it goes."""

    title: str
    group: str
    series: list[Series]
    logs: bool = False
    marks: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def points(run: Run) -> dict[str, Points]:
    """Return the values of every metric of a run by step."""
    found: dict[str, dict[int, float | None]] = {}
    for line in run.metrics:
        for name, value in line.items():
            if name != "step":
                found.setdefault(name, {})[line["step"]] = finite(value)
    return {name: (sorted(own), [own[step] for step in sorted(own)]) for name, own in found.items()}


def thinned(whole: Points, most: int) -> Points:
    """Return at most about `most` points: of each stretch its lowest, highest and missing value.

    The first and the last point are kept.
    """
    steps, values = whole
    if len(steps) <= most:
        return whole
    stretches = max(1, (most - 2) // 2)
    kept = {0, len(steps) - 1}
    for k in range(stretches):
        part = range(k * len(steps) // stretches, (k + 1) * len(steps) // stretches)
        own = [(y, i) for i in part if (y := values[i]) is not None]
        kept |= {min(own)[1], max(own)[1]} if own else set(part[:1])
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Return the charts of runs, the losses first; curves of one metric share a chart."""
    every = [points(run) for run in runs]
    names = dict.fromkeys(name for own in every for name in own)
    losses = [name for name in names if _is_loss(name, runs)]
    made = [Chart("Loss", "training", _of(every, losses), logs=True, marks=_spikes(runs))]
    for title, name in (
        ("Learning rate", "train/learning_rate"),
        ("Gradient norm", "train/grad_norm"),
        ("Images per second", "time/images_per_s"),
        ("Share of the time that waits for data", "time/data_wait_share"),
        ("Model FLOP utilization", "time/mfu"),
    ):
        made.append(Chart(title, "training", _of(every, [name]), logs="norm" in title))
    taken = {series.metric for chart in made for series in chart.series}
    skipped = (SPIKE, "spike/median", "time/eta_s", "time/compile_s", "data/ids")
    for name in names:
        if name in taken or name in skipped or name.endswith("/unigram_loss"):
            continue
        evaluator = name.partition("/")[0]
        in_config = any(evaluator in run.evaluators for run in runs)
        group = evaluator if in_config else "more"
        made.append(Chart(_title(name, in_config), group, _of(every, [name])))
    return [chart for chart in made if any(len(s.points[0]) > 1 for s in chart.series)]


def _title(name: str, in_config: bool) -> str:
    return name.partition("/")[2] if in_config else name


def _of(every: Sequence[dict[str, Points]], names: Iterable[str]) -> list[Series]:
    return [
        Series(k, name, own[name]) for name in names for k, own in enumerate(every) if name in own
    ]


def _is_loss(name: str, runs: Sequence[Run]) -> bool:
    """Return whether a metric is the learner's own loss, in training or in an evaluation."""
    evaluator, _, metric = name.partition("/")
    own = any(run.evaluators.get(evaluator, {}).get("evaluator") == "loss" for run in runs)
    return name == "train/loss" or (own and metric in ("loss", "unigram_loss"))


def _spikes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    found = []
    for k, run in enumerate(runs):
        for line in run.metrics:
            loss = finite(line.get(SPIKE))
            if loss is not None:
                text = f"step {line['step']}: the loss spikes to {loss:.4g}"
                found.append({"run": k, "x": line["step"], "y": loss, "text": text})
    return found[:500]


def for_page(made: Sequence[Chart], runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return charts as JSON for the page's script, together of at most ALL_POINTS points.

    With one run, curves of a chart differ in color; with several, runs do, and metrics in dashes.
    """
    count = sum(len(chart.series) for chart in made)
    most = max(20, min(POINTS, ALL_POINTS // max(1, count)))
    found = []
    for chart in made:
        metrics = list(dict.fromkeys(series.metric for series in chart.series))
        curves = []
        for series in chart.series:
            steps, values = thinned(series.points, most)
            kind = metrics.index(series.metric)
            name = series.metric
            if len(runs) > 1:
                name = runs[series.run].name + (f" {series.metric}" if len(metrics) > 1 else "")
            curves.append(
                {
                    **{"name": name, "metric": series.metric, "run": series.run},
                    "color": (series.run if len(runs) > 1 else kind) % 8,
                    "dash": kind % 4 if len(runs) > 1 else 0,
                    "noisy": series.metric.startswith(("train/", "time/")),
                    "x": steps,
                    "y": [None if y is None else float(f"{y:.6g}") for y in values],
                }
            )
        entry = {"title": chart.title, "logs": chart.logs, "marks": chart.marks, "whole": True}
        found.append(entry | {"series": curves})
    return found


def summary(chart: Chart, runs: Sequence[Run]) -> str:
    """Return the last value of each curve in words."""
    parts = []
    for series in chart.series:
        steps, values = series.points
        who = f"{runs[series.run].name}: " if len(runs) > 1 else ""
        parts.append(f"{who}{series.metric} {figure(values[-1])} at step {steps[-1]:,}")
    return "; ".join(parts) + "."


def finals(run: Run) -> dict[str, dict[str, Any]]:
    """Return of every metric its last value and step; if it has more, also its best, if known."""
    found: dict[str, dict[str, Any]] = {}
    for name, (steps, values) in points(run).items():
        if name.startswith(("spike/", "data/ids")):
            continue
        entry: dict[str, Any] = {"value": values[-1], "step": steps[-1]}
        better = direction(name)
        own = [
            (value, step) for step, value in zip(steps, values, strict=True) if value is not None
        ]
        if better and len(own) > 1:
            first = lambda pair: pair[0]  # the first of equal ones
            best, at = (min if better == "lower" else max)(own, key=first)
            entry |= {"best": best, "best_step": at}
        found[name] = entry
    return found


def direction(name: str) -> str:
    """Return whether "lower" or "higher" values of a metric are better; "" if it is not known."""
    kind, _, last = name.rpartition("/")
    if kind in ("time", "data", "spike") or UNRANKED.search(last):
        return ""
    return "lower" if LOWER.search(last) else "higher" if HIGHER.search(last) else ""


def figure(value: Any) -> str:
    """Return a number for people: four digits, thousands separated."""
    if value is None:
        return "not finite"
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= 1e300:
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
