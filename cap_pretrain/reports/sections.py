"""Parts of the page: figures, examples, what was run, and what it cost."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cap_pretrain.pages.markup import Markup, element, image, markup, table
from cap_pretrain.reports import deltas, series
from cap_pretrain.reports.series import figure
from cap_pretrain.reports.workdir import Run, entries, finite, section, whole

UP = 160
"""Small images are drawn larger, by a whole factor, up to this longer side in pixels."""

IMAGE_BYTES = 3_000_000
"""Bytes of all images of a page at most: about 4 MB in base64."""

WIDE = 3
"""Images of an example that stand beside those of another one; more take the whole width."""

MARKS = {True: ("right", "✓", "right"), False: ("wrong", "✗", "wrong")}
"""CSS class, sign and word for what is right or wrong."""

Cells = list[list[Any]]


def titled(title: str, *content: Any, id_: str | None = None) -> Markup:
    """Return a section with a heading, or nothing if all of its content is empty."""
    inside = markup(*content)
    heading = element("h2", title)
    return element("section", heading, inside, id=id_) if inside else markup()


def run_name(runs: Sequence[Run], k: int) -> Markup:
    """Return the name of run `k` beside the color of its curves."""
    return element("span", runs[k].name, class_=f"run k{k % 8}")


def heads(runs: Sequence[Run], first: str) -> list[Any]:
    """Return the headings of a table with a column for each run."""
    return [first, *(run_name(runs, k) if len(runs) > 1 else "" for k in range(len(runs)))]


# Figures ------------------------------------------------------------------------------------------


def finals(runs: Sequence[Run]) -> Markup:
    """Return the table of final figures; in rows of several runs the best value is bold."""
    every = [series.finals(run) for run in runs]
    names = dict.fromkeys(name for own in every for name in own)
    of_evals = [n for n in names if any(n.partition("/")[0] in run.evaluators for run in runs)]
    chosen = [name for name in names if name in ("train/loss", "train/accuracy")] + of_evals
    rest = [name for name in names if name not in chosen and name != "time/eta_s"]
    make = _final_of_one if len(runs) == 1 else _final_of_several
    more = element("details", element("summary", "All logged figures"), make(runs, every, rest))
    return titled("Final figures", make(runs, every, chosen), more if rest else None, id_="figures")


def _final_of_one(_: Sequence[Run], every: Sequence[dict], names: Iterable[str]) -> Markup:
    rows = []
    for name in names:
        entry = every[0][name]
        best = f"{figure(entry['best'])} at {entry['best_step']:,}" if "best" in entry else ""
        rows.append([element("code", name), figure(entry["value"]), f"{entry['step']:,}", best])
    return (
        table(rows, ("", "n", "n", "n"), ("figure", "last", "at step", "best"))
        if rows
        else markup()
    )


def _final_of_several(runs: Sequence[Run], every: Sequence[dict], names: Iterable[str]) -> Markup:
    rows: Cells = []
    learners = {section(run.config, "learner").get("name") for run in runs}
    for name in names:
        values = [own.get(name, {}).get("value") for own in every]
        finite = [v for v in values if v is not None]
        better = series.direction(name)
        kinds = {run.evaluators.get(name.partition("/")[0], {}).get("evaluator") for run in runs}
        if len(learners) > 1 and (name.startswith("train/") or "loss" in kinds):
            better = ""  # the tasks of different learners do not compare
        best = (min if better == "lower" else max)(finite) if better and len(finite) > 1 else None
        cells = [
            element("span", figure(v), class_="best" if v == best else None)
            if name in own and (v is not None or own[name]["value"] is None)
            else deltas.ABSENT
            for v, own in zip(values, every, strict=True)
        ]
        rows.append([element("code", name), *cells])
    return table(rows, ("", *["n"] * len(runs)), heads(runs, "figure")) if rows else markup()


# Examples -----------------------------------------------------------------------------------------


def examples(runs: Sequence[Run]) -> Markup:
    """Return the examples of all evaluators; those of several runs side by side."""
    names = dict.fromkeys(name for run in runs for name in run.shown)
    count = sum(len(run.shown) for run in runs)
    budget = [IMAGE_BYTES // max(1, count)] * len(runs)
    parts = [_examples_of(runs, name, budget) for name in names]
    return titled("Examples", parts, id_="examples")


def _examples_of(runs: Sequence[Run], name: str, budget: Sequence[int]) -> Markup:
    by_title: dict[str, dict[int, Markup]] = {}
    widest: dict[str, int] = {}  # panels of an example, those of all runs together
    for k, run in enumerate(runs):
        left = budget[k]
        for exhibit in run.shown.get(name, {}).get("exhibits", ()):
            title, panels = exhibit["title"], exhibit["panels"]
            left -= sum(len(panel["data"]) for panel in panels)
            if left < 0:
                break
            widest[title] = widest.get(title, 0) + len(panels)
            shown = _exhibit(exhibit, _earlier(run, name, title))
            by_title.setdefault(title, {})[k] = shown
    if not by_title:
        return markup()
    steps = dict.fromkeys(f"{run.shown[name]['step']:,}" for run in runs if name in run.shown)
    heading = element("h3", element("code", name), element("small", f" at step {', '.join(steps)}"))
    cards = [
        element(
            "article",
            element("small", title),
            own[0] if len(runs) == 1 else _beside(runs, own),
            class_=f"exhibit {_width(widest[title])}",
        )
        for title, own in by_title.items()
    ]
    return markup(heading, element("div", cards, class_="exhibits"))


def _width(panels: int) -> str:
    """Return the CSS class of an example with so many images."""
    return "single" if panels < 2 else "double" if panels <= WIDE else "broad"


def _beside(runs: Sequence[Run], own: Mapping[int, Markup]) -> Markup:
    parts = [element("div", run_name(runs, k), content) for k, content in own.items()]
    return element("div", parts, class_="side")


def _earlier(run: Run, name: str, title: str) -> Markup | None:
    """Return the captions that an image had at earlier evaluations, to be opened."""
    found = {step: own[title] for step, own in run.earlier.get(name, {}).items() if title in own}
    lines = [
        element("p", element("small", f"step {step:,} "), text) for step, text in found.items()
    ]
    return element("details", element("summary", "earlier captions"), lines) if lines else None


def _exhibit(exhibit: Mapping[str, Any], more: Markup | None = None) -> Markup:
    panels = [_panel(panel) for panel in exhibit["panels"]]
    lines = [
        element(
            "p",
            element("small", f"{line['label']} ") if line["label"] else None,
            _marked(line["text"], line["right"]),
        )
        for line in exhibit["lines"]
    ]
    return markup(element("div", panels, class_="panels"), lines, more)


def _panel(panel: Mapping[str, Any]) -> Markup:
    width, height = panel["width"], panel["height"]
    factor = max(1, UP // max(width, height))
    shown = image(
        panel["data"],
        panel["type"],
        alt=panel["label"] or "the image",
        title=f"{width} × {height} pixels",
        width=factor * width,
        height=factor * height,
        class_="up" if factor > 1 else None,
    )
    right = panel["right"]
    caption = element("figcaption", _marked(panel["label"], right))
    return element(
        "figure", shown, caption if panel["label"] or right is not None else None, class_="panel"
    )


def _marked(text: str, right: bool | None) -> Markup:
    if right is None:
        return markup(text)
    kind, sign, word = MARKS[right]
    return markup(element("span", sign, class_=kind, role="img", aria_label=word), " ", text)


# What was run, and what it cost -------------------------------------------------------------------


def facts(runs: Sequence[Run]) -> Markup:
    """Return the table of what was run."""
    rows: dict[str, list[Any]] = {}
    for k, run in enumerate(runs):
        for name, value in _facts(run).items():
            rows.setdefault(name, [deltas.ABSENT] * len(runs))[k] = value
    return table([[name, *values] for name, values in rows.items()], head=heads(runs, ""))


def _facts(run: Run) -> dict[str, Any]:
    config, noted, plan = run.config, run.facts, run.plan
    parameters = section(noted, "parameters") or section(plan, "parameters")
    devices, versions = section(noted, "devices"), section(noted, "versions")
    model, data = section(config, "model"), section(config, "data")
    found: dict[str, Any] = {
        "learner": section(config, "learner").get("name"),
        "model": f"{model.get('name')}, images of {data.get('image_size')} pixels",
    }
    if (phases := entries(noted, "phases"))[1:]:
        spans = [(whole(p.get("start")) + 1, whole(p.get("stop")), p.get("what")) for p in phases]
        found["phases"] = "; ".join(f"steps {a:,} to {b:,}: {what}" for a, b, what in spans)
    if parameters:
        parts = ", ".join(f"{k} {figure(n)}" for k, n in parameters.items() if k != "total")
        found["parameters"] = f"{figure(parameters.get('total'))} ({parts})"
    if devices:
        processes = f", {devices.get('processes')} processes" * (devices.get("processes") != 1)
        found["devices"] = f"{devices.get('count')} × {devices.get('kind')}{processes}"
        found["mesh"] = " × ".join(f"{k} {n}" for k, n in section(noted, "mesh").items())
    if noted.get("commit"):
        found["commit"] = element("code", noted["commit"])
    if versions:
        found["versions"] = ", ".join(f"{k} {v}" for k, v in versions.items())
    found["seed"] = config.get("seed")
    return {name: value for name, value in found.items() if value not in (None, "")}


def config(run: Run) -> Markup:
    """Return the table of the config's differences from the default."""
    changed = deltas.from_default(run.config)
    rows = [
        [
            element("code", name),
            element("code", deltas.written(own)),
            element("code", deltas.written(usual)),
        ]
        for name, (own, usual) in changed.items()
    ]
    if not rows:
        return markup()
    intro = element(
        "p",
        "Fields that differ from the default; those of the learner and of evaluators, from the "
        "defaults of these.",
        class_="soft",
    )
    return markup(intro, table(rows, head=("field", "value", "default")))


def differences(runs: Sequence[Run]) -> Markup:
    """Return the table of fields in which configs differ; nothing for one run."""
    if len(runs) < 2:
        return markup()
    rows = [
        [element("code", name), *(element("code", deltas.written(v)) for v in values)]
        for name, values in deltas.between(runs).items()
    ]
    content = table(rows, head=heads(runs, "field")) if rows else element("p", "They are equal.")
    return titled("Differences of the configs", content, id_="differences")


def data(run: Run) -> Markup:
    """Return what was read: datasets and their sizes, losses of their builds, broken images."""
    rows = [
        [
            part.get("name"),
            part.get("split"),
            figure(part.get("examples")),
            figure(part.get("weight")),
        ]
        for part in entries(run.facts, "data")
    ]
    parts = (
        [table(rows, ("", "", "n", "n"), ("dataset", "split", "examples", "weight"))]
        if rows
        else []
    )
    for name, splits in run.builds.items():
        losses = [_losses(split, own) for split, own in splits.items() if isinstance(own, dict)]
        head = ("split", "candidates", "kept", "dropped")
        parts.append(element("p", "How ", element("code", name), " was built:"))
        parts.append(table(losses, ("", "n", "n"), head))
    count, listed = run.broken
    if count:
        note = f"Examples that did not decode and were replaced (broken.jsonl): {count:,}"
        rows = [[line.get("id"), line.get("dataset"), line.get("reason")] for line in listed]
        parts += [element("p", note), table(rows, head=("id", "dataset", "reason"))]
    elif parts:
        parts.append(element("p", "No example failed to decode in training."))
    return markup(*parts)


def _losses(split: str, own: Mapping[str, Any]) -> list[Any]:
    dropped = [
        f"{figure(entry.get('count') if isinstance(entry, dict) else entry)} {reason}"
        for reason, entry in section(own, "dropped").items()
    ]
    return [
        split,
        figure(own.get("candidates")),
        figure(own.get("kept")),
        ", ".join(dropped) or "none",
    ]


def cost(runs: Sequence[Run]) -> Markup:
    """Return the table of what runs cost."""
    rows: dict[str, list[Any]] = {}
    for k, run in enumerate(runs):
        for name, value in costs(run).items():
            rows.setdefault(name, [deltas.ABSENT] * len(runs))[k] = written(name, value)
    content = [[name, *values] for name, values in rows.items()]
    return titled(
        "Cost",
        table(content, ("", *["n"] * len(runs)), heads(runs, "")) if content else None,
        id_="cost",
    )


def costs(run: Run) -> dict[str, float]:
    """Return what a run has cost, as far as it is known: seconds, device-hours, FLOPs, examples."""
    starts = entries(run.facts, "starts")
    seconds = sum(_amount(start.get("seconds")) for start in starts)
    hours = sum(_amount(s.get("seconds")) * _amount(s.get("devices")) for s in starts) / 3600
    flops = section(run.facts, "flops_per_example") or section(run.plan, "flops_per_example")
    spent = run.examples * _amount(flops.get("training"))
    if (phases := entries(run.facts, "phases") or entries(run.plan, "phases"))[1:]:
        spent = sum(
            _amount(phase.get("training"))
            * (run.shown_by(whole(phase.get("stop"))) - run.shown_by(whole(phase.get("start"))))
            for phase in phases
        )
    in_steps = _seconds_in_steps(run)
    epoch = whole(run.facts.get("epoch"))
    found = {
        "wall time": seconds,
        "time in steps": in_steps,
        "device-hours": hours,
        "starts": len(starts),
        "steps": run.step,
        "examples": run.examples,
        "epochs": run.examples / epoch if epoch else 0,
        "training FLOPs": spent,
    }
    return {name: value for name, value in found.items() if value}


def _amount(value: Any) -> float:
    return float(finite(value) or 0)


def _seconds_in_steps(run: Run) -> float:
    """Return the time that logged steps took, without compiling, evaluating and saving."""
    seconds, last = 0.0, 0
    for line in run.metrics:
        if (took := finite(line.get("time/step_ms"))) is not None:
            seconds += took / 1000 * max(0, line["step"] - last)
        if "train/loss" in line:
            last = line["step"]
    return seconds


def written(name: str, value: float) -> str:
    """Return a cost with its unit."""
    if "time" in name:
        return duration(value)
    if name == "training FLOPs":
        return f"{value:.3g}"
    return figure(value)


def duration(seconds: float) -> str:
    """Return a duration such as "2 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours / 24:.1f} days"
