"""The model card of an exported encoder; it may be published, so it shows no local folders."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain import files
from cap_pretrain.untrusted import checked

# Parts of a config that concern the machine and the logging, not the training itself.
_NOT_SHOWN = ("checkpoint", "log", "eval", "evals", "mesh", "deterministic", "encoder")
_NOT_SHOWN_OF_DATA = ("dir", "workers", "eval_split")

# An absolute path, one relative to a home or parent folder, or a URL after its scheme.
_FOLDERS = re.compile(r"(?:(?<=^)|(?<=[\s:+,;=('\"]))(?:~\w*|\.{1,2})?/(?:[^\s:+,;)'\"/]*/)*")

_POOLED = {
    "gap": "`outputs.last_hidden_state.mean(1)` (the model has no pooling head)",
    "map": "`outputs.pooler_output` (attention pooling)",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """An export, as far as the card describes it."""

    step: int  # training step of the checkpoint
    parameters: int  # number of parameters of the encoder
    averaged: bool  # whether they are the moving average of the trained parameters
    evaluations: Mapping[str, Mapping[str, Any]]  # by name, from `read_evaluations`
    dual: str  # folder of the SiglipModel inside the export; "" if there is none
    left_out: str  # what could not be exported, and why; "" if nothing


def write_card(path: Path, config: ConfigDict, exported: Exported) -> None:
    """Write a README.md in the form of the Hugging Face hub."""
    name, side = config.model.name, config.data.image_size
    paragraphs = [
        "---\nlibrary_name: transformers\npipeline_tag: image-feature-extraction\n---",
        f"# ViT-{name}, pretrained by cap_pretrain",
        f"A vision encoder ({exported.parameters:,} parameters, images of {side} x {side}) from "
        f"step {exported.step:,} of a run with the learner `{config.learner.name}`"
        + (", the moving average of its parameters." if exported.averaged else "."),
        "```python\nfrom transformers import AutoImageProcessor, SiglipVisionModel\n\n"
        "processor = AutoImageProcessor.from_pretrained(FOLDER)\n"
        "model = SiglipVisionModel.from_pretrained(FOLDER)\n"
        'outputs = model(**processor(images=image, return_tensors="pt"))\n```',
        f"Tokens of the patches: `outputs.last_hidden_state`. The pooled vector that the run's own "
        f"evaluations used: {_POOLED[config.model.pool]}. In cap_pretrain it is "
        "`--config.encoder=FOLDER`. The processor interpolates where the run averaged areas, so "
        "pixels differ slightly.",
    ]
    if exported.dual:
        paragraphs += _dual_encoder(exported.dual, config.learner.contrast)
    if exported.left_out:
        paragraphs += [f"Not included: {exported.left_out}."]
    if exported.evaluations:
        paragraphs += [f"## Metrics at step {exported.step:,}", _table(exported.evaluations)]
    training = json.dumps(_shown(config), indent=2)
    paragraphs += ["## Training", f"```json\n{training}\n```"]
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def _dual_encoder(folder: str, contrast: str) -> list[str]:
    probabilities = (
        "`logits_per_image.softmax(-1)` over the texts"
        if contrast == "softmax"
        else "`logits_per_image.sigmoid()`"
    )
    return [
        "## Images and texts",
        f"```python\nfrom transformers import AutoProcessor, SiglipModel\n\n"
        f'processor = AutoProcessor.from_pretrained(FOLDER, subfolder="{folder}")\n'
        f'model = SiglipModel.from_pretrained(FOLDER, subfolder="{folder}")\n'
        'inputs = processor(images=image, text=texts, padding="max_length", truncation=True, '
        'return_tensors="pt")\noutputs = model(**inputs)\n```',
        f"Probabilities: {probabilities}. The padding is required, since the text tower treats it "
        "like any other token. `tokenizer.json` gives the token ids of the training; the class "
        "`SiglipTokenizer` would not, since it removes punctuation.",
    ]


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
