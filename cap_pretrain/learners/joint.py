"""Several learners of one encoder, trained together: as captioning and contrast in SigLIP 2.

Every `Part` computes its loss from the same pass of the encoder, and the loss of the joint learner
is their weighted sum. Each part is a complete learner that shares the encoder, so evaluators and
tools can use it alone (see `learners.able`).
"""

import contextlib
import dataclasses
import re
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.learners.contrastive import Contrastive
from cap_pretrain.learners.parts import Part
from cap_pretrain.learners.weights import Weight
from cap_pretrain.models.encoder import ImageEncoder
from cap_pretrain.naflex import LAYOUTS

RESERVED = ("data",)
"""What comes before "/" in metrics of a training step that are not those of a part."""


class Joint(Contrastive):
    """A weighted sum of the losses of several parts, which share one encoder.

    The parts are ordered by name. The first one that is active, that is, whose weight is not always
    0, gets the random key of the loss as it is, also for the encoder; the key of each other part
    follows from its name.

    Args:
        parts: The parts by name; all have the same encoder.
        weights: Their weights.
    """

    layouts = LAYOUTS  # each part has its own

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Settings of `config.learner`.

        Attributes:
            parts: The parts by name. A part has the fields of `config.learner` of the learner that
                it is: its `name`, as "captioner", and its options.
            weights: The weight of each part: a number, or points WEIGHT@SHARE joined by commas, as
                "0@0.5,1@0.8": 0 in the first half of the run, rising to 1 at 80% of it, and 1 from
                there. In evaluation the last weight counts. A part whose weight is 0 is not
                computed.
        """

        parts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
        weights: dict[str, str] = dataclasses.field(default_factory=dict)

        def __post_init__(self):
            for name, section in self.parts.items():
                _check_part(name, section)
            if {*self.parts} != {*self.weights}:
                raise UserError(
                    f"learner.weights: has {_listed(self.weights)}, but learner.parts has "
                    f"{_listed(self.parts)}; give each part a weight."
                )
            _ = self.parsed

        @property
        def parsed(self) -> dict[str, Weight]:
            """The weights by name, in the order of the parts."""
            return {
                name: Weight.parse(text, f"learner.weights.{name}")
                for name, text in sorted(self.weights.items())
            }

    reads = ("image",)  # at least; see `reads_of`

    def __init__(self, parts: dict[str, Part], weights: dict[str, Weight]):
        self.encoder: ImageEncoder = next(iter(parts.values())).encoder
        self.parts = nnx.Dict(parts)
        self.weights = tuple(weights.items())

    @classmethod
    def reads_of(cls, options: Options) -> tuple[str, ...]:
        """Return what the parts read of a batch, and "progress" if weights change."""
        kinds = [learners.learner_class(part["name"]) for _, part in sorted(options.parts.items())]
        read = dict.fromkeys(name for kind in kinds for name in kind.reads)
        changing = not all(weight.constant for weight in options.parsed.values())
        return (*cls.reads, *(n for n in read if n != "image"), *("progress",) * changing)

    @classmethod
    def changes(cls, config: ConfigDict) -> list[tuple[float, dict[str, str]]]:
        """Return the shares of a run at which parts begin or end, and the weights from there on.

        While its weight stays 0, a part is not computed; see `training.phases`. Raises UserError if
        all weights are 0 at some time.
        """
        weights = _weights(config)
        shares = {share for weight in weights.values() for share, _ in weight.points}
        for share in sorted({*shares, 0.0, 1.0}):
            if not any(weight.then(share) for weight in weights.values()):
                raise UserError(
                    f"learner.weights: all are 0 at {share:g} of the run; leave one positive."
                )
        found = []
        for name, weight in weights.items():
            field = f"learner.weights.{name}"
            for start, stop in weight.zeros() if weight.ever else ():
                found.append((start, {field: "0"}))
                if stop < 1:
                    found.append((stop, {field: config.learner.weights[name]}))
        return found

    @classmethod
    def idle(cls, config: ConfigDict) -> tuple[str, ...]:
        """Return where the parameters of parts are whose weight is always 0, as path prefixes."""
        weights = learners.options(config).parsed
        return tuple(f"parts/{name}/" for name, weight in weights.items() if not weight.ever)

    @classmethod
    def like(cls, section: dict[str, Any]) -> ConfigDict:
        """Return the default of `config.learner` with the parts that a section has."""
        given = section.get("parts")
        parts = {} if not isinstance(given, dict) else given
        parts = {name: part for name, part in parts.items() if isinstance(part, dict)}
        sections = {name: learners.defaults_like(part).to_dict() for name, part in parts.items()}
        return learners.defaults("joint", parts=sections, weights=dict.fromkeys(parts, "1"))

    @classmethod
    def members(cls, config: ConfigDict) -> list[learners.Member]:
        """Return the parts that the learner of a config trains, each with its config."""
        weights = learners.options(config).parsed
        found: list[learners.Member] = []
        for name, part in sorted(config.learner.parts.items()):
            inner = learners.members(learners.with_learner(config, part))
            if weights[name].ever:
                found += [own._replace(name=f"{name}/{own.name}".rstrip("/")) for own in inner]
        return found

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "Joint":
        """Build the learner that `config` describes.

        The first part whose weight is not always 0 is initialized as it would be alone, with the
        encoder of all parts. The parameters of the others depend on the seed and their name only.
        """
        weights, key = _weights(config), rngs.params.key[...]
        first = next((name for name, weight in weights.items() if weight.ever), min(weights))
        parts: dict[str, Part] = {}
        for name, section in sorted(config.learner.parts.items()):
            changed, kind = (
                learners.with_learner(config, section),
                learners.learner_class(section.name),
            )
            named = nnx.Rngs(params=jax.random.fold_in(key, zlib.crc32(name.encode())))
            with _naming(f"learner.parts.{name}"):
                parts[name] = kind.from_config(
                    changed, vocab_size, rngs if name == first else named
                )
        for part in parts.values():
            part.encoder = parts[first].encoder
        return cls(parts, weights)

    def embed(self, batch: dict[str, jax.Array], key: jax.Array, train: bool) -> dict[str, Any]:
        """Return the rows of each active part by name, and what else the loss needs.

        Active are the parts whose weight is ever positive in training, and at the end of the run in
        evaluation. Images are encoded if one of them needs it.
        """
        weights = dict(self.weights)
        active = [name for name, w in weights.items() if (w.ever if train else w.last > 0)]
        first = self.parts[active[0]]
        encoded: Any = None
        if any(self.parts[name].reads_encoded for name in active):
            encoded = first.encode(batch["image"], train=train, key=first.encoder_key(key))
        rows = {}
        for name in active:
            named = key
            if name != active[0]:
                named = jax.random.fold_in(key, zlib.crc32(name.encode()))
            rows[name] = self.parts[name].rows(encoded, batch, named, train)
        examples = batch.get("mask", jnp.ones(len(batch["image"]), bool))
        embedded = {"parts": rows, "examples": examples}
        if "progress" in batch:
            embedded["progress"] = batch["progress"]
        return embedded

    def contrast(self, embedded: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Return the weighted sum of the losses, and the metrics `PART/NAME` of each part.

        These include PART/loss, and PART/loss_weight: that of an average over batches.
        """
        metrics: dict[str, Any] = {}
        progress = embedded["progress"][0] if "progress" in embedded else None
        terms = []
        for name, weight in self.weights:
            if name in embedded["parts"]:
                loss, own = self.parts[name].reduce(embedded["parts"][name])
                now = weight.at(progress)
                terms.append(now * loss)
                own = {"loss": loss, "weight": jnp.float32(now), **own}
                metrics |= {f"{name}/{key}": value for key, value in own.items()}
        metrics["loss_weight"] = jnp.sum(embedded["examples"]).astype(jnp.float32)
        return sum(terms[1:], terms[0]), metrics


def _weights(config: ConfigDict) -> dict[str, Weight]:
    """Return the weights by name; raise UserError if there are no parts."""
    weights = learners.options(config).parsed
    if not weights:
        raise UserError("learner.parts: is empty; name the learners to train together.")
    return weights


def _check_part(name: str, section: dict[str, Any]) -> None:
    """Raise UserError if a part cannot share its encoder, or its options are not valid."""
    where = f"learner.parts.{name}"
    if not name.isidentifier():
        raise UserError(f"{where}: {name!r} is not a name of letters, digits and _; rename it.")
    if name in RESERVED:
        raise UserError(f"{where}: metrics of another kind are called {name}/…; rename it.")
    kind = learners.learner_class(section.get("name", ""))
    if not (issubclass(kind, Part) and kind.joins):
        able = [name for name in learners.REGISTRY if _joins(name)]
        raise UserError(
            f"{where}.name: a {section['name']} cannot share its encoder with other learners; "
            f"choose among {', '.join(able)}."
        )
    with _naming(where):
        learners.options_of(section)


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Name the fields of a part in a UserError as they are called in the joint learner."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"^learner\.", f"{where}.", str(error))) from error


def _joins(name: str) -> bool:
    kind = learners.learner_class(name)
    return issubclass(kind, Part) and kind.joins


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
