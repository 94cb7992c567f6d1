"""The model card of an exported encoder; it may be published, so it shows no local folders."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain import files
from cap_pretrain.convert.layouts.base import Written
from cap_pretrain.untrusted import checked

# Parts of a config that concern the machine and the logging, not the training itself.
_NOT_SHOWN = ("checkpoint", "log", "eval", "evals", "mesh", "deterministic", "encoder")
_NOT_SHOWN_OF_DATA = ("dir", "workers", "eval_split")

# An absolute path, one relative to a home or parent folder, or a URL after its scheme.
_FOLDERS = re.compile(r"(?:(?<=^)|(?<=[\s:+,;=('\"]))(?:~\w*|\.{1,2})?/(?:[^\s:+,;)'\"/]*/)*")

_TRAINING = (  # tag, label and format of figures of the training
    ("train/loss", "training loss", "{:.4g}".format),
    ("time/images_per_s", "images per second", "{:,.0f}".format),
    ("time/goodput", "share of time spent on steps", "{:.0%}".format),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """An export, as far as the card describes it."""

    step: int  # training step of the checkpoint
    parameters: int  # number of parameters of the encoder
    averaged: bool  # whether they are the moving average of the trained parameters
    evaluations: Mapping[str, Mapping[str, Any]]  # by name, from `read_evaluations`
    figures: Mapping[str, float | None]  # the last ones of the training up to that step, by tag
    written: Written  # by the layout
    licence: str = ""  # of the weights, in the hub's spelling; "" leaves a note to fill in


def write_card(path: Path, config: ConfigDict, exported: Exported) -> None:
    """Write a README.md in the form of the Hugging Face hub."""
    name, side, written = config.model.name, config.data.image_size, exported.written
    head = {"library_name": written.library, "pipeline_tag": "image-feature-extraction"}
    if exported.licence:
        head["license"] = exported.licence
    lines = "\n".join(f"{k}: {v}" for k, v in head.items())
    licence = f"`{exported.licence}`." if exported.licence else "TODO: the licence of the weights."
    paragraphs = [
        f"---\n{lines}\n---",
        f"# ViT-{name}, pretrained by cap_pretrain",
        f"A vision encoder ({exported.parameters:,} parameters, images of {side} x {side}) from "
        f"step {exported.step:,} of a run with the learner `{config.learner.name}`"
        + (", the moving average of its parameters." if exported.averaged else "."),
        *written.usage,
    ]
    if written.left_out:
        paragraphs += [f"Not included: {written.left_out}."]
    if exported.evaluations:
        paragraphs += [f"## Metrics at step {exported.step:,}", _table(exported.evaluations)]
    paragraphs += ["## Data", _data(config), "## Training"]
    if exported.figures:
        paragraphs += [_figures(exported)]
    training = json.dumps(_shown(config), indent=2)
    paragraphs += [f"```json\n{training}\n```"]
    paragraphs += ["## Licence", f"{licence}", "## Limits"]
    paragraphs += ["TODO: intended use, known errors, and whom they concern."]
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def _data(config: ConfigDict) -> str:
    """Return a sentence about the training data."""
    members = without_folders(str(config.data.name))
    return f"Trained on `{members}`. TODO: where the data comes from and who may use it."


def _figures(exported: Exported) -> str:
    """Return the last figures of the training as a sentence."""
    shown = [
        f"{label} {form(exported.figures[tag])}"
        for tag, label, form in _TRAINING
        if exported.figures.get(tag) is not None
    ]
    return f"At the last report up to step {exported.step:,}: {', '.join(shown)}."


def read_evaluations(workdir: Path, step: int) -> dict[str, dict[str, Any]]:
    """Return the results of `evals/NAME/STEP.json` by the name of the evaluation."""
    found = sorted((workdir / "evals").glob(f"*/{step}.json"))
    return {
        path.parent.name: checked(files.read_json(path), "result", dict, path) for path in found
    }


def without_folders(value: Any) -> Any:
    """Return JSON-like data with paths in its texts reduced to their last part."""
    if isinstance(value, dict):
        return {k: without_folders(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(v) for v in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _shown(config: ConfigDict) -> dict[str, Any]:
    shown = {k: v for k, v in config.to_dict().items() if k not in _NOT_SHOWN}
    shown["data"] = {k: v for k, v in shown["data"].items() if k not in _NOT_SHOWN_OF_DATA}
    return without_folders(shown)


def _table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table with a row per evaluation: floats are its metrics, integers its counts."""
    rows = ["| evaluation | data | metrics | counts | protocol |", "|---|---|---|---|---|"]
    for name, result in evaluations.items():
        options = checked(result.get("options", {}), "options", dict, f"evals: {name}")
        data = (result.get(k) or options.get(o) for k, o in (("dataset", "data"), ("split",) * 2))
        numbers = {k: v for k, v in result.items() if k != "step" and type(v) in (int, float)}
        cells = [
            f"`{name}`",
            " ".join(str(part) for part in data if part),
            ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if isinstance(v, float)),
            ", ".join(f"{k} {v:,}" for k, v in numbers.items() if isinstance(v, int)),
            str(result.get("protocol", "")),
        ]
        rows.append(f"| {' | '.join(without_folders(cells)).replace(chr(10), ' ')} |")
    return "\n".join(rows)
