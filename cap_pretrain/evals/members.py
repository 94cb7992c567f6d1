"""Evaluators of every dataset of a mixture."""

import re
from pathlib import PurePath

from ml_collections import ConfigDict

from cap_pretrain import evals
from cap_pretrain.data.sources.base import parse_mixture
from cap_pretrain.data.sources.open import in_original_layout


def sections(config: ConfigDict) -> dict[str, ConfigDict]:
    """Return a section for each further dataset of a mixture and each evaluator of the run's data.

    The evaluators in the config read the first dataset, under the name in the config. Those of
    another one are called NAME_DATASET, as val_coco for `val` on data/coco. A dataset that another
    section of the same evaluator names is left out.
    """
    mixture = [name for name, _ in parse_mixture(config.data.name)] if config.data.name else []
    taken = {(s.evaluator, s.get("data", "")) for s in config.evals.values()}
    found: dict[str, ConfigDict] = {}
    for name, section in config.evals.items():
        if section.get("data", None) != "" or not getattr(
            evals.options(name, section), "reads_data", True
        ):
            continue
        for member in dict.fromkeys(mixture[1:]):
            if member == mixture[0] or (section.evaluator, member) in taken:
                continue
            own = section.copy_and_resolve_references()
            with own.unlocked():
                own.data = member
            key = f"{name}_{label(member)}"
            number = 2
            while key in config.evals or key in found:
                key, number = f"{name}_{label(member)}_{number}", number + 1
            found[key] = own
    return found


def label(dataset: str) -> str:
    """Return the last part of a dataset's name as part of a key: data/my-photos gives my_photos."""
    found = in_original_layout(dataset)
    path = found[1] if found else dataset
    part = PurePath(path.partition(":")[0] if not found and "://" not in path else path).name
    return re.sub(r"\W+", "_", part).strip("_") or "data"
