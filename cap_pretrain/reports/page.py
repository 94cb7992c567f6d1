"""The report as one page."""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

from cap_pretrain.pages.markup import Markup, asset, document, element, markup
from cap_pretrain.reports import sections, series
from cap_pretrain.reports.sections import titled
from cap_pretrain.reports.series import Chart, figure
from cap_pretrain.reports.workdir import Run

PACKAGE = "cap_pretrain.reports"

CARDS = ("loss", "accuracy", "top1", "CIDEr", "image_to_text_r1", "perplexity")
"""Last words of evaluators' metrics that the top of the page shows, in this order."""


def page(runs: Sequence[Run], *, live: int = 0) -> str:
    """Return the page of runs; see `reports.render`."""
    made = series.charts(runs)
    names = ", ".join(run.name for run in runs)
    title = names if len(runs) == 1 else f"{len(runs)} runs: {names}"
    content = {
        "runs": [
            {"name": run.name, "batches": run.batches, "finals": series.finals(run)} for run in runs
        ],
        "charts": series.for_page(made, runs),
    }
    version = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    body = [
        *(_problems(runs), sections.finals(runs), sections.differences(runs)),
        *(_curves(made, runs), _evaluations(made, runs), sections.examples(runs)),
        titled("What was run", sections.facts(runs), id_="facts"),
        *(_of_each(runs), sections.cost(runs)),
    ]
    header = element("header", element("h1", title), _lead(runs), _nav(body), _cards(runs))
    return document(
        title,
        element("main", header, body),
        style=asset(PACKAGE, "report.css"),
        script=asset(PACKAGE, "report.js"),
        data=content | {"version": version, "live": live},
        live=bool(live),
    )


def _lead(runs: Sequence[Run]) -> Markup:
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    states = [_state(run) if len(runs) == 1 else f"{run.name}: {_state(run)}" for run in runs]
    return element("p", f"{'; '.join(states)}. Written {made}.", class_="lead")


def _nav(body: Iterable[Markup]) -> Markup:
    """Return links to the sections that there are."""
    found = [re.match(r'<section id="(\w+)"><h2>([^<]*)</h2>', part) for part in body]
    return element(
        "nav",
        [element("a", Markup(m[2]), href=f"#{m[1]}") for m in found if m],
        aria_label="Sections",
    )


def _state(run: Run) -> str:
    if not run.total:
        return f"step {run.step:,}" if run.step else "evaluated only"
    done = "finished at" if run.step >= run.total else "at"
    return f"{done} step {run.step:,} of {run.total:,}"


def _cards(runs: Sequence[Run]) -> Markup:
    """Return the figures at the top, of one run."""
    if len(runs) > 1:
        return markup()
    (run,) = runs
    finals, costs = series.finals(run), sections.costs(run)
    shown: dict[str, Any] = {}
    if "train/loss" in finals:
        shown["training loss"] = figure(finals["train/loss"]["value"])
    for last in CARDS:
        for name, entry in finals.items():
            evaluator, _, metric = name.partition("/")
            if evaluator in run.evaluators and metric == last and len(shown) < 6:
                shown[f"{evaluator}: {metric}"] = figure(entry["value"])
    for name in ("wall time", "time in steps"):
        if name in costs and not any("time" in key for key in shown):
            shown[name] = sections.written(name, costs[name])
    cards = [
        element("div", element("b", v), element("small", k), class_="card")
        for k, v in shown.items()
    ]
    return element("div", cards, class_="cards")


def _problems(runs: Sequence[Run]) -> Markup:
    return markup(element("p", line, class_="note") for run in runs for line in run.problems)


def _curves(made: Sequence[Chart], runs: Sequence[Run]) -> Markup:
    training = [chart for chart in made if chart.group == "training"]
    more = [chart for chart in made if chart.group == "more"]
    if not made:
        return markup()
    axis = [element("option", name, value=name) for name in ("steps", "examples")]
    smooth = element("input", type="range", id="smooth", min=0, max=98, value=0)
    tools = [
        element("label", "across ", element("select", axis, id="axis")),
        element("label", element("input", type="checkbox", id="log"), " logarithmic loss"),
        element("label", "smoothing ", smooth),
        element("button", "Show all", type="button", class_="reset", disabled=""),
        element("small", "Drag to zoom, double-click to show all.", class_="hint"),
    ]
    hidden = element("summary", f"More curves of training ({len(more)})")
    return titled(
        "Curves",
        element("div", tools, class_="tools"),
        _charts(training, made, runs, first=True),
        element("details", hidden, _charts(more, made, runs)) if more else None,
        id_="curves",
    )


def _evaluations(made: Sequence[Chart], runs: Sequence[Run]) -> Markup:
    groups = dict.fromkeys(c.group for c in made if c.group not in ("training", "more"))
    parts = []
    for group in groups:
        own = [chart for chart in made if chart.group == group]
        parts.append(markup(element("h3", element("code", group)), _protocol(group, runs)))
        parts.append(_charts(own, made, runs))
    return titled("Evaluations over time", parts, id_="evaluations")


def _protocol(name: str, runs: Iterable[Run]) -> Markup | None:
    """Return how an evaluator measures, in the words of its results."""
    found = {str(r["protocol"]) for run in runs if "protocol" in (r := run.results.get(name, {}))}
    return element("p", "; ".join(sorted(found)), class_="soft") if found else None


def _charts(
    own: Sequence[Chart], made: Sequence[Chart], runs: Sequence[Run], first: bool = False
) -> Markup:
    figures = [
        element(
            "figure",
            element("figcaption", chart.title),
            element("p", series.summary(chart, runs), class_="summary unseen"),
            class_="chart first" if first and not k else "chart",
            data_chart=made.index(chart),
        )
        for k, chart in enumerate(own)
    ]
    return element("div", figures, class_="charts")


def _of_each(runs: Sequence[Run]) -> Markup:
    """Return the data and the config of each run."""
    parts = []
    for k, run in enumerate(runs):
        heading = element("h3", sections.run_name(runs, k)) if len(runs) > 1 else None
        changed = sections.config(run)
        if len(runs) > 1:
            changed = element("details", element("summary", "Config"), changed)
        parts.append(markup(heading, sections.data(run), changed))
    return titled("Data and config", parts, id_="config")
