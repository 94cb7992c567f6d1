"""Export as folders that transformers loads: the encoder, and a dual encoder whole inside it.

These are SiglipVisionModel and, in `siglip/`, SiglipModel; or for an encoder with all options of
CLIP's, CLIPVisionModel and, in `clip/`, CLIPModel. Siglip2VisionModel and, in `siglip/`,
Siglip2Model take their place for images in their own aspect ratio, with transformers' processor.
"""

from pathlib import Path

from cap_pretrain import learners
from cap_pretrain.convert import export, export_clip
from cap_pretrain.convert.layouts import processor
from cap_pretrain.convert.layouts.base import Source, Written
from cap_pretrain.naflex import SQUARE

_POOLED = {
    "gap": "`outputs.last_hidden_state.mean(1)` (the model has no pooling head)",
    "map": "`outputs.pooler_output` (attention pooling)",
    "class": "`outputs.pooler_output` (the class token)",
}
_MASKED_MEAN = (
    "the mean of `outputs.last_hidden_state` over the tokens that `pixel_attention_mask` marks"
)


def write(folder: Path, source: Source) -> Written:
    """Write the vision encoder, and a dual encoder whole where possible; see `layouts.write`."""
    config = source.config
    is_clip = export_clip.is_clip(config)
    left_out = _left_out(source, is_clip)
    writer = export_clip if is_clip else export
    writer.write_vision_model(folder, config, source.inside("encoder"))
    trusted, pooled = "", _POOLED[config.model.pool]
    if is_square := config.data.layout == SQUARE:
        processor.write(folder)
        trusted = ", trust_remote_code=True"
    elif config.model.pool == "gap":
        pooled = _MASKED_MEAN
    kind = "CLIP" if is_clip else export.name(config)
    model = f"{kind}VisionModel"
    usage = [
        f"```python\nfrom transformers import AutoImageProcessor, {model}\n\n"
        f"processor = AutoImageProcessor.from_pretrained(FOLDER{trusted})\n"
        f"model = {model}.from_pretrained(FOLDER)\n"
        'outputs = model(**processor(images=image, return_tensors="pt"))\n```',
        f"Tokens of the patches: `outputs.last_hidden_state`. The pooled vector that the run's own "
        f"evaluations used: {pooled}. In cap_pretrain it is "
        "`--config.encoder=FOLDER`.",
    ]
    usage.append(
        f"`trust_remote_code` runs the short `{processor.FILE}` of this folder, which needs OpenCV "
        "and gives the very pixels of the run's own evaluations. Without it, a processor of "
        "transformers interpolates where the run averaged areas, so pixels differ slightly."
        if is_square
        else "The processor interpolates where the run averaged areas, so pixels differ slightly. "
        "Tokens beyond those that `pixel_attention_mask` marks are padding."
    )
    parts: tuple[str, ...] = ()
    if not left_out:
        inside = "clip" if is_clip else "siglip"
        writer.write_dual_encoder(folder / inside, source)
        if is_square:
            processor.write(folder / inside)
        usage += _dual_encoder(inside, kind, config.learner.contrast, config.text.punctuation)
        parts = (f"{inside}: the same with text tower and tokenizer",)
    return Written("transformers", tuple(usage), parts, left_out)


def _left_out(source: Source, is_clip: bool) -> str:
    """Return what cannot be written besides the encoder, and why; "" if nothing."""
    config = source.config
    if config.learner.name == "dual_encoder" and is_clip:
        left_out = export_clip.why_not_whole(learners.options(config))
    else:
        left_out = export.why_not_whole(config)
    if left_out:
        return left_out
    if source.tokenizer is None and source.byte_pairs is None:
        return "the text tower, because transformers has no tokenizer of whole words"
    if source.byte_pairs is not None and not is_clip:
        return (
            "the text tower, because it reads padding, for which CLIP's tokenizer of transformers "
            "has no id"
        )
    return ""


def _dual_encoder(inside: str, kind: str, contrast: str, punctuation: bool) -> list[str]:
    model = f"{kind}Model"
    probabilities = (
        "`logits_per_image.softmax(-1)` over the texts"
        if contrast == "softmax"
        else "`logits_per_image.sigmoid()`"
    )
    differs = "; the class `SiglipTokenizer` would not, since it removes punctuation"
    padding = (
        "The padding is required, since the text tower treats it like any other token. "
        f"`tokenizer.json` gives the token ids of the training{differs if punctuation else ''}."
        if inside == "siglip"
        else "Texts are truncated to the length of the text tower."
    )
    return [
        "## Images and texts",
        f"```python\nfrom transformers import AutoProcessor, {model}\n\n"
        f'processor = AutoProcessor.from_pretrained(FOLDER, subfolder="{inside}")\n'
        f'model = {model}.from_pretrained(FOLDER, subfolder="{inside}")\n'
        'inputs = processor(images=image, text=texts, padding="max_length", truncation=True, '
        'return_tensors="pt")\noutputs = model(**inputs)\n```',
        f"Probabilities: {probabilities}. {padding}",
    ]
