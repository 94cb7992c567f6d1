"""Export as folders that transformers loads: SiglipVisionModel, and SiglipModel in `siglip/`."""

from pathlib import Path

from cap_pretrain.convert import export
from cap_pretrain.convert.layouts import processor
from cap_pretrain.convert.layouts.base import Source, Written

DUAL = "siglip"  # folder of the SiglipModel

_POOLED = {
    "gap": "`outputs.last_hidden_state.mean(1)` (the model has no pooling head)",
    "map": "`outputs.pooler_output` (attention pooling)",
}


def write(folder: Path, source: Source) -> Written:
    """Write the vision encoder, and a dual encoder whole where possible; see `layouts.write`."""
    config = source.config
    left_out = export.why_not_whole(config)
    if not left_out and source.tokenizer is None:
        left_out = "the text tower, because transformers has no tokenizer of whole words"
    export.write_vision_model(folder, config, source.inside("encoder"))
    processor.write(folder)
    usage = [
        "```python\nfrom transformers import AutoImageProcessor, SiglipVisionModel\n\n"
        "processor = AutoImageProcessor.from_pretrained(FOLDER, trust_remote_code=True)\n"
        "model = SiglipVisionModel.from_pretrained(FOLDER)\n"
        'outputs = model(**processor(images=image, return_tensors="pt"))\n```',
        f"Tokens of the patches: `outputs.last_hidden_state`. The pooled vector that the run's own "
        f"evaluations used: {_POOLED[config.model.pool]}. In cap_pretrain it is "
        "`--config.encoder=FOLDER`.",
        f"`trust_remote_code` runs the short `{processor.FILE}` of this folder, which needs OpenCV "
        "and gives the very pixels of the run's own evaluations. Without it, a processor of "
        "transformers interpolates where the run averaged areas, so pixels differ slightly.",
    ]
    parts: tuple[str, ...] = ()
    if not left_out and source.tokenizer is not None:
        export.write_dual_encoder(folder / DUAL, config, source.params, source.tokenizer)
        processor.write(folder / DUAL)
        usage += _dual_encoder(config.learner.contrast)
        parts = (f"{DUAL}: the same with text tower and tokenizer",)
    return Written("transformers", tuple(usage), parts, left_out)


def _dual_encoder(contrast: str) -> list[str]:
    probabilities = (
        "`logits_per_image.softmax(-1)` over the texts"
        if contrast == "softmax"
        else "`logits_per_image.sigmoid()`"
    )
    return [
        "## Images and texts",
        f"```python\nfrom transformers import AutoProcessor, SiglipModel\n\n"
        f'processor = AutoProcessor.from_pretrained(FOLDER, subfolder="{DUAL}")\n'
        f'model = SiglipModel.from_pretrained(FOLDER, subfolder="{DUAL}")\n'
        'inputs = processor(images=image, text=texts, padding="max_length", truncation=True, '
        'return_tensors="pt")\noutputs = model(**inputs)\n```',
        f"Probabilities: {probabilities}. The padding is required, since the text tower treats it "
        "like any other token. `tokenizer.json` gives the token ids of the training; the class "
        "`SiglipTokenizer` would not, since it removes punctuation.",
    ]
