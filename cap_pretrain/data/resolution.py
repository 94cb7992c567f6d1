"""The size of the images of a run: `data.first_sizes`, then `data.image_size`."""

from typing import Any

from ml_collections import ConfigDict

from cap_pretrain.errors import UserError

FIELD = "data.first_sizes"


def first_sizes(config: ConfigDict) -> list[tuple[int, float]]:
    """Return the sides in pixels that come before `data.image_size`, with their shares of the run.

    Raises UserError if a part of the field is not SIDE:SHARE, a positive integer and number.
    """
    text, found = config.data.first_sizes, []
    for part in filter(None, text.split("+")):
        side, _, share = part.partition(":")
        try:
            found.append((int(side), float(share)))
        except ValueError:
            found.append((0, 0.0))
        if not (found[-1][0] > 0 and 0 < found[-1][1] <= 1):
            raise UserError(
                f"{FIELD}: {part!r} in {text!r} is not SIDE:SHARE, as in 84:0.7+112:0.2, with "
                "shares of the run between 0 and 1."
            )
    return found


def training_side(config: ConfigDict) -> int:
    """Return the side in pixels of the images that a training step of a config reads.

    In a config that is that of a phase (see `changes`), it is the side of the phase, in any other
    one `data.image_size`.
    """
    first = first_sizes(config)
    whole = len(first) == 1 and first[0][1] == 1
    return first[0][0] if whole else config.data.image_size


def changes(config: ConfigDict) -> list[tuple[float, dict[str, Any]]]:
    """Return how the size changes during the run; see `training.phases.changes`.

    The config of a phase has, as `data.first_sizes`, the side of all its steps, "84:1", or "".
    """
    found, begun = [], 0.0
    for side, share in first_sizes(config):
        found.append((begun, {FIELD: f"{side}:1"}))
        begun += share
    return [*found, (begun, {FIELD: ""})] if found else []


def check(config: ConfigDict) -> None:
    """Raise UserError if `data.first_sizes` leaves no part of the run to `data.image_size`."""
    if sum(share for _, share in first_sizes(config)) > 1 - 1e-9:
        raise UserError(
            f"{FIELD}: the shares in {config.data.first_sizes!r} add up to 1 or more; leave a part "
            "of the run to data.image_size."
        )
