"""Training objectives by name, as config files take them: `cap`, `siglip`, `cap+siglip`."""

from typing import Any

from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError, did_you_mean

OBJECTIVES: dict[str, tuple[str, dict[str, Any]]] = {
    # 0.75: the paper's share of parallel prediction (Tschannen et al. 2023, 2306.07915).
    "cappa": ("captioner", {"parallel_fraction": 0.75}),
    "cap": ("captioner", {"parallel_fraction": 0.0}),
    # 0.5: the share of captions in parallel of LocCa's decoder in SigLIP 2 (2502.14786).
    "locca": ("locca", {"parallel_fraction": 0.5}),
    "clip": ("dual_encoder", {"contrast": "softmax"}),
    "siglip": ("dual_encoder", {"contrast": "sigmoid"}),
    "coca": ("coca", {}),
    "aimv2": ("aimv2", {}),
    "distill": ("distillation", {}),
    "masked": ("masked_patches", {}),
}
"""The learner of each objective, and the options that differ from its defaults."""


def section(text: str) -> ConfigDict:
    """Return the section `learner` of a config for an objective.

    Several joined by "+" are the parts of a joint learner; "cap+siglip:0.5" gives the second one
    the weight 0.5.

    Raises:
        UserError: An objective is unknown or named twice, or a weight is not one.
    """
    parts: dict[str, ConfigDict] = {}
    weights: dict[str, str] = {}
    for part in text.split("+"):
        name, colon, weight = part.partition(":")
        if name not in OBJECTIVES:
            raise UserError(
                f"--config: objective={text!r} is unknown.{did_you_mean(name, OBJECTIVES)}"
            )
        if name in parts:
            raise UserError(f"--config: objective={text!r} has {name} twice; name it once.")
        learner, options = OBJECTIVES[name]
        parts[name] = learners.defaults(learner, **options)
        weights[name] = weight if colon else "1"
    if len(parts) > 1:
        sections = {name: part.to_dict() for name, part in parts.items()}
        return learners.defaults("joint", parts=sections, weights=weights)
    if ":" in text:
        raise UserError(f"--config: objective={text!r} has a weight, but one part; leave it out.")
    return parts[text]
