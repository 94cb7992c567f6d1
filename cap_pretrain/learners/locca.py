"""LocCa: captioning with referring expressions and their boxes (Wan et al. 2024, 2403.19596)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.errors import UserError
from cap_pretrain.learners.captioner import Captioner
from cap_pretrain.learners.token_losses import is_target, mean_where, token_weights, weighted_loss
from cap_pretrain.models import decoding
from cap_pretrain.models.layers import EncoderOutput
from cap_pretrain.models.text import PAD, Cache

SIDES = 4  # coordinates of a box: left, top, right, bottom
TASKS = ("cap", "aref", "gcap")


class Texts(NamedTuple):
    """The texts of a task for each image of a batch, C of them.

    Attributes:
        text: int32 [B, C, T], padded with 0.
        prompt: int32 [B, C], number of tokens that are given.
        start: What the decoder reads first, which says what the task is.
    """

    text: jax.Array
    prompt: jax.Array
    start: int


class LocCa(Captioner):
    """A captioner that also learns where things are, by two more kinds of text.

    - cap: the caption, as in Cap and CapPa.
    - aref: a phrase that refers to a region, then the box of the region.
    - gcap: the box of a region, then its phrase.

    A box is four tokens, its coordinates rounded to `bins` values, which follow the words in the
    vocabulary. The decoder starts with another token for each task, in the place of the paper's
    prefixes "ARef:" and "GCap:"; captions start as in a `Captioner`, so all that works with its
    captions works with these. The same decoder writes all texts, and the loss of an image is the
    mean of its tasks. Images without regions have captions only.

    Attributes:
        words: Number of tokens of the tokenizer. Coordinates are `words` to `words + bins - 1`;
            the two start tokens follow.
    """

    @dataclasses.dataclass(frozen=True)
    class Options(Captioner.Options):
        """Settings of `config.learner`; `parallel_fraction` applies to captions only.

        Attributes:
            bins: Number of values of a coordinate. By default those of the paper, the
                integers from 0 to 500.
            cap_weight: Weight of captions in the loss. Tasks of weight 0 are not computed.
            aref_weight: Weight of phrases followed by boxes.
            gcap_weight: Weight of boxes followed by phrases.
            conditional: Whether the first part of these texts is given, so that only the box after
                the phrase and the phrase after the box count, as in transfer to referring
                expressions. By default both count, as in the paper's pretraining.
        """

        bins: int = 501
        cap_weight: float = 1.0
        aref_weight: float = 1.0
        gcap_weight: float = 1.0
        conditional: bool = False

        def __post_init__(self):
            super().__post_init__()
            if not 2 <= self.bins <= 2**16:
                raise UserError(f"learner.bins: {self.bins} is not from 2 to 65536.")
            weights = [getattr(self, f"{task}_weight") for task in TASKS]
            if min(weights) < 0 or not sum(weights):
                raise UserError(
                    f"learner.cap_weight, aref_weight, gcap_weight: {weights} must not be negative "
                    "or all 0."
                )

    reads = ("image", "text", "prompt", "phrases", "boxes")

    options: Options
    words: int

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int, rngs: nnx.Rngs) -> "LocCa":
        """Build the learner that `config` describes; raise UserError if texts are too short."""
        if config.text.length < SIDES + 2:
            raise UserError(
                f"text.length: {config.text.length} tokens do not hold a phrase and a box; give "
                f"at least {SIDES + 2}."
            )
        extra = learners.options(config).bins + 2
        learner = super().from_config(config, vocab_size + extra, rngs)
        assert isinstance(learner, LocCa)
        learner.words = vocab_size
        return learner

    @property
    def starts(self) -> dict[str, int]:
        """The token that the decoder reads first, by task."""
        after = self.words + self.options.bins
        return {"cap": PAD, "aref": after, "gcap": after + 1}

    def coordinates(self, boxes: jax.Array) -> jax.Array:
        """Return the tokens int32 [..., 4] of boxes [..., 4] in [0, 1]."""
        steps = jnp.round(jnp.clip(boxes, 0.0, 1.0) * (self.options.bins - 1))
        return self.words + steps.astype(jnp.int32)

    def boxes(self, coordinates: jax.Array) -> jax.Array:
        """Return the boxes float32 [..., 4] of their tokens."""
        return (coordinates - self.words).astype(jnp.float32) / (self.options.bins - 1)

    def region_texts(self, phrases: jax.Array, boxes: jax.Array) -> dict[str, Texts]:
        """Return the texts of the tasks "aref" and "gcap".

        Args:
            phrases: int32 [B, K, T], each with EOS; those of regions that an image does not have
                are without tokens. They are cut to leave room for the box.
            boxes: float32 [B, K, 4].
        """
        place = jnp.arange(phrases.shape[-1])
        count = jnp.sum(phrases != PAD, axis=-1, keepdims=True)
        eos = jnp.take_along_axis(phrases, jnp.maximum(count - 1, 0), axis=-1)
        n = phrase_length(count, phrases.shape[-1])
        box = self.coordinates(boxes)

        def text(box_at: jax.Array | int, phrase_at: int) -> jax.Array:
            side = jnp.clip(place - box_at, 0, SIDES - 1)
            side = jnp.broadcast_to(side, phrases.shape)
            result = jnp.take_along_axis(box, side, axis=-1)
            inside = (place >= phrase_at) & (place < phrase_at + n)
            result = jnp.where(inside, jnp.roll(phrases, phrase_at, axis=-1), result)
            result = jnp.where(place == n + SIDES, eos, result)
            return jnp.where((place <= n + SIDES) & (count > 0), result, PAD)

        given = int(self.options.conditional)
        prompts = {"aref": n[..., 0] * given, "gcap": jnp.full(n.shape[:-1], SIDES * given)}
        texts = {"aref": text(n, 0), "gcap": text(0, SIDES)}
        return {task: Texts(texts[task], prompts[task], self.starts[task]) for task in texts}

    def texts(self, batch: dict[str, jax.Array]) -> dict[str, Texts]:
        """Return the texts of a batch by task, but for tasks of weight 0."""
        text = batch["text"][:, None]
        prompt = jnp.broadcast_to(batch.get("prompt", 0), (len(text),))[:, None]
        found = {"cap": Texts(text, prompt, self.starts["cap"])}
        if "phrases" in batch:
            found |= self.region_texts(batch["phrases"], batch["boxes"])
        return {task: own for task, own in found.items() if self.weight(task)}

    def weight(self, task: str) -> float:
        """Return the weight of a task in the loss."""
        return getattr(self.options, f"{task}_weight")

    def rows(
        self, encoded: EncoderOutput, batch: dict[str, jax.Array], key: jax.Array, train: bool
    ) -> dict[str, Any]:
        """Compute the cross-entropy of each token of all texts; see `Part.rows`.

        Args:
            encoded: The encoder's output.
            batch: What a `Captioner` reads; and optionally "phrases" int32 [B, K, T] and "boxes"
                float32 [B, K, 4], see `regions.encoded`.
            key: Random key for parallel prediction and dropout.
            train: Whether to compute the training loss.

        Returns:
            For each task `nll` float32 [B, C, T], `correct` and `targets` bool [B, C, T],
            `examples` float32 [B, C] (1 if a text counts); for captions that are predicted in
            parallel `parallel` bool [B].
        """
        tasks = self.texts(batch)
        parallel_key, _, decoder_key = jax.random.split(key, 3)
        text = jnp.concatenate([own.text for own in tasks.values()], axis=1)
        prompt = jnp.concatenate([own.prompt for own in tasks.values()], axis=1)
        starts = [jnp.full(own.prompt.shape, own.start) for own in tasks.values()]
        is_parallel = parallel = None
        if train and self.options.parallel_fraction and "cap" in tasks:
            p = self.options.parallel_fraction
            is_parallel = jax.random.bernoulli(parallel_key, p, (len(text),))
            parallel = jnp.pad(is_parallel[:, None], ((0, 0), (0, text.shape[1] - 1)))
        states = self.states(
            self.read_tokens(encoded.tokens, key) if train else encoded.tokens,
            _flat(text),
            None if parallel is None else _flat(parallel),
            prompt=_flat(prompt),
            start=_flat(jnp.concatenate(starts, axis=1)),
            key=decoder_key if train else None,
        )
        smoothing = self.options.label_smoothing if train else 0.0
        nll, correct = self.token_losses(states, _flat(text), smoothing)
        targets = is_target(text, prompt)
        mask = batch.get("mask", jnp.ones(len(text), bool)).astype(jnp.float32)
        of_all = {
            "nll": nll.reshape(text.shape),
            "correct": correct.reshape(text.shape),
            "targets": targets,
            "examples": mask[:, None] * jnp.any(targets, axis=2),
        }
        rows, first = {}, 0
        for task, own in tasks.items():
            end = first + own.text.shape[1]
            rows[task] = {name: values[:, first:end] for name, values in of_all.items()}
            first = end
        if is_parallel is not None:
            rows["cap"]["parallel"] = is_parallel
        return rows

    def reduce(self, rows: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Return the mean loss of the images, each the mean of its tasks by weight, and metrics.

        With `average` "token", it is the mean over all tokens, by the weights of their tasks.
        """
        average = self.options.average
        per_text = {task: _of_texts(own) for task, own in rows.items()}
        by_image = {task: jnp.max(own["examples"], axis=1) for task, own in rows.items()}
        of_images = sum(self.weight(task) * has for task, has in by_image.items())
        parts = []
        for task, own in rows.items():
            share = own["examples"] * self.weight(task)
            if average == "example":
                regions = jnp.maximum(jnp.sum(own["examples"], axis=1), 1)
                share = share / (regions * jnp.where(of_images > 0, of_images, 1))[:, None]
            tokens = token_weights(_flat(own["targets"]), None, average)
            parts.append((_flat(own["nll"]), _flat(own["correct"]), tokens * _flat(share)[:, None]))
        nll, correct, weights = (jnp.concatenate(part) for part in zip(*parts, strict=True))
        images = jnp.sum(of_images > 0).astype(jnp.float32)
        total = images if average == "example" else jnp.sum(weights)
        loss, metrics = weighted_loss(nll, correct, weights, total)

        for task, own in rows.items():
            metrics[f"loss_{task}"] = mean_where(per_text[task], own["examples"])
            metrics[f"loss_{task}_weight"] = jnp.sum(own["examples"])
        if "parallel" in rows.get("cap", {}):
            parallel, counts = rows["cap"]["parallel"], by_image["cap"]
            captions = per_text["cap"][:, 0]
            metrics["parallel_share"] = jnp.mean(parallel.astype(jnp.float32))
            metrics["loss_parallel"] = mean_where(captions, parallel * counts)
            metrics["loss_autoregressive"] = mean_where(captions, ~parallel * counts)
        return loss, metrics

    def decode_step(
        self, tokens: jax.Array, position: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """Read tokens int32 [B * beams]; return the next logits [B * beams, words] and the cache.

        The logits are those of words, so that captions have no coordinates.
        """
        logits, cache = super().decode_step(tokens, position, cache)
        return logits[:, : self.words], cache

    def locate(self, images: jax.Array, text: jax.Array) -> jax.Array:
        """Return the box that greedy decoding writes after each phrase.

        Args:
            images: uint8 [B, H, W, 3].
            text: Phrases with EOS, int32 [B, T].

        Returns:
            float32 [B, 4]: left, top, right and bottom, as shares of width and height.
        """
        length = text.shape[1]
        n = phrase_length(jnp.sum(text != PAD, axis=1, keepdims=True), length)
        starts = self.starts
        after = starts["gcap"]  # the decoder is not asked for it, so it can end the text
        learner = decoding.for_decoding(self)

        def step(tokens: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            positions = learner.text_positions[...]
            logits, cache = learner.decoder.step(tokens, position, positions, cache)
            ids = jnp.arange(logits.shape[-1])
            side = (ids >= self.words) & (ids < self.words + self.options.bins)
            allowed = jnp.where(position < n + SIDES, side, ids == after)
            return jnp.where(allowed, logits, -jnp.inf), cache

        written = decoding.decode(
            step,
            self.init_decoding(images),
            decoding.Decoding(method="greedy"),
            decoding.CaptionSpec(batch=len(text), length=length, start=starts["aref"], eos=after),
            prompt=jnp.where(jnp.arange(length) < n, text, PAD),
        )
        return self.boxes(jnp.take_along_axis(written, n + jnp.arange(SIDES), axis=1))


def phrase_length(count: jax.Array, length: int) -> jax.Array:
    """Return how many words of a phrase of `count` tokens, with EOS, fit before a box and EOS."""
    return jnp.clip(count - 1, 0, length - SIDES - 1)


def _flat(values: jax.Array) -> jax.Array:
    """Return [B, C, …] as [B * C, …]."""
    return values.reshape(-1, *values.shape[2:])


def _of_texts(rows: dict[str, jax.Array]) -> jax.Array:
    """Return the mean loss of the tokens of each text, [B, C]."""
    targets = rows["targets"].astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(targets, axis=2), 1)
    return jnp.sum(rows["nll"] * targets, axis=2) / tokens
