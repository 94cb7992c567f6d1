"""What a learner needs of a dataset."""

from collections.abc import Collection

from cap_pretrain.data.regions import regions_of
from cap_pretrain.data.sources.base import Source, without_image
from cap_pretrain.errors import UserError

_LOOKED_AT = 100
"""Examples, from the first one, of which some must have captions or regions."""


def has_captions(source: Source) -> bool:
    """Return whether one of the first examples has a caption."""
    count = min(_LOOKED_AT, len(source))
    return any(without_image(source, i)["captions"] for i in range(count))


def has_regions(source: Source) -> bool:
    """Return whether one of the first examples has a region (see `regions`)."""
    count = min(_LOOKED_AT, len(source))
    return any(regions_of(source, i, without_image(source, i)) for i in range(count))


def check_reads(source: Source, reads: Collection[str], why: str) -> None:
    """Raise UserError if a source lacks a part of `reads`.

    That is, if the first example has no label, or none of the first 100 has captions; a learner
    that reads "boxes" can do with regions instead, so ask for each part of a joint learner alone
    (`learners.needs`). In the message `why`, {} stands for the source
    and what it lacks.
    """

    def has_text() -> bool:
        return has_captions(source) or ("boxes" in reads and has_regions(source))

    def has_label() -> bool:
        return without_image(source, 0)["label"] >= 0

    for part, has_part in (("text", has_text), ("label", has_label)):
        if part in reads and not has_part():
            what = why.format(f"{source} has no {part}")
            raise UserError(f"{what}; name another dataset or set data.fields.")


def check_regions(sources: Collection[Source], reads: Collection[str]) -> None:
    """Raise UserError if a learner reads "boxes" and no source has regions."""
    if "boxes" in reads and not any(map(has_regions, sources)):
        names = ", ".join(map(str, sources))
        raise UserError(
            f"data.name: {names} has no regions (phrases with boxes), which this learner needs; "
            "name a dataset that has some (docs/locca.md)."
        )
