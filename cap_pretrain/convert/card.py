"""The model card of an exported encoder: what it is, how to load it, how it was trained and judged.

It is made to be published, so it names no folders of the machine it was made on.
"""

import json
import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cap_pretrain.convert.weights import read_json

# Parts of a config that say where and how a run went, not what was learned.
_NOT_SHOWN = ("checkpoint", "log", "eval", "evals", "mesh", "deterministic", "encoder")
_NOT_SHOWN_OF_DATA = ("dir", "workers", "eval_split")

# An absolute path, one from a home or parent folder, or the part of a URL behind the scheme.
_FOLDERS = re.compile(r"(?:(?<=^)|(?<=[\s:+,;=('\"]))(?:~\w*|\.{1,2})?/(?:[^\s:+,;)'\"/]*/)*")

_POOLED = {
    "gap": "`outputs.last_hidden_state.mean(1)` (the model has no pooling head)",
    "map": "`outputs.pooler_output` (attention pooling)",
}


def write_card(
    path: Path,
    config: ConfigDict,
    *,
    step: int,
    parameters: int,
    averaged: bool,
    evaluations: dict[str, dict[str, Any]],
    dual: str,
    left_out: str,
) -> None:
    """Writes a README.md in the form of the Hugging Face hub.

    Args:
      path: where to.
      config: of the run.
      step: of the checkpoint.
      parameters: how many the encoder has.
      averaged: whether they are the moving average of those trained.
      evaluations: from `read_evaluations`.
      dual: the folder of the SiglipModel beside the vision model; "" if there is none.
      left_out: what could not be exported, and why; "" if nothing.
    """
    name, side = config.model.name, config.data.image_size
    learned = json.dumps(_shown(config), indent=2)
    paragraphs = [
        "---\nlibrary_name: transformers\npipeline_tag: image-feature-extraction\n---",
        f"# ViT-{name}, pretrained by cap_pretrain",
        f"A vision encoder ({parameters:,} parameters, images of {side} x {side}) from step "
        f"{step:,} of a run with the learner `{config.learner.name}`"
        + (", the moving average of its parameters." if averaged else "."),
        "```python\nfrom transformers import AutoImageProcessor, SiglipVisionModel\n\n"
        "processor = AutoImageProcessor.from_pretrained(FOLDER)\n"
        "model = SiglipVisionModel.from_pretrained(FOLDER)\n"
        'outputs = model(**processor(images=image, return_tensors="pt"))\n```',
        f"Tokens of the patches: `outputs.last_hidden_state`. The pooled vector that the run's own "
        f"evaluations used: {_POOLED[config.model.pool]}. In cap_pretrain it is "
        "`--config.encoder=FOLDER`. The processor interpolates where the run averaged areas, so "
        "pixels differ a little.",
    ]
    if dual:
        probabilities = (
            "`logits_per_image.softmax(-1)` over the texts"
            if config.learner.contrast == "softmax"
            else "`logits_per_image.sigmoid()`"
        )
        paragraphs += [
            "## Images and texts",
            f"```python\nfrom transformers import AutoProcessor, SiglipModel\n\n"
            f'processor = AutoProcessor.from_pretrained(FOLDER, subfolder="{dual}")\n'
            f'model = SiglipModel.from_pretrained(FOLDER, subfolder="{dual}")\n'
            'inputs = processor(images=image, text=texts, padding="max_length", truncation=True, '
            'return_tensors="pt")\noutputs = model(**inputs)\n```',
            f"Probabilities: {probabilities}. The padding is part of what the text tower reads, so "
            "it has to be there. `tokenizer.json` gives the ids of the training; the class "
            "`SiglipTokenizer` would not, since it removes punctuation.",
        ]
    if left_out:
        paragraphs += [f"Not in here: {left_out}."]
    if evaluations:
        paragraphs += [f"## Figures at step {step:,}", _table(evaluations)]
    paragraphs += ["## Training", f"```json\n{learned}\n```"]
    path.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")


def read_evaluations(workdir: Path, step: int) -> dict[str, dict[str, Any]]:
    """The results in `evals/NAME/STEP.json` by the name of the evaluation."""
    found = sorted((workdir / "evals").glob(f"*/{step}.json"))
    return {path.parent.name: read_json(path) for path in found}


def without_folders(value: Any) -> Any:
    """Text, or the texts in anything that is JSON, with paths cut down to the last part."""
    if isinstance(value, dict):
        return {k: without_folders(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(v) for v in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _shown(config: ConfigDict) -> dict[str, Any]:
    shown = {k: v for k, v in config.to_dict().items() if k not in _NOT_SHOWN}
    shown["data"] = {k: v for k, v in shown["data"].items() if k not in _NOT_SHOWN_OF_DATA}
    return without_folders(shown)


def _table(evaluations: dict[str, dict[str, Any]]) -> str:
    """One row an evaluation: fractional numbers are its figures, whole ones are counts."""
    rows = ["| evaluation | data | figures | counts | protocol |", "|---|---|---|---|---|"]
    for name, result in evaluations.items():
        options = result.get("options", {})
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
