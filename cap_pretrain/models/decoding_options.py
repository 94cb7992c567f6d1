"""Options of decoding, which evaluators, tools and configs have in common."""

import dataclasses

import jax

from cap_pretrain.errors import UserError, did_you_mean
from cap_pretrain.models import processors
from cap_pretrain.models.beam_search import CaptionSpec
from cap_pretrain.models.processors import Processor

METHODS = ("greedy", "beam", "sample")


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Decoding method. Base of the options of evaluators that write captions.

    Attributes:
        method: "greedy", "beam" or "sample".
        beams: Beam search: number of live captions per image. 1 is greedy decoding.
        length_norm: Beam search: a caption of n tokens scores its log-probability divided by
            n ** length_norm. 0 is the log-probability, 1 its mean over tokens.
        temperature: Sampling: divisor of the logits.
        top_k: Sampling: number of most likely tokens to draw from. 0 is all.
        top_p: Sampling: probability mass of the smallest set of most likely tokens to draw from.
        min_length: Number of tokens that a caption has at least, without its end.
        repetition_penalty: Divisor of positive logits, and factor of negative ones, of tokens that
            the caption already has. 1 is none; 1.2 is common.
        no_repeat_ngram: No sequence of this many tokens occurs twice in a caption. 0 is no limit.
        captions: Number of captions per image: the best of a beam search, at most `beams`, or as
            many samples. Evaluators judge the first, and record all with their log-probabilities.
        groups: Beam search: number of groups that the beams are divided into, which are made to
            differ (diverse beam search). 1 is beam search.
        diversity: Beam search in groups: log-probability that a token loses for each beam of
            earlier groups that has chosen it at the same position.
    """

    method: str = "greedy"
    beams: int = 4
    length_norm: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_length: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    captions: int = 1
    groups: int = 1
    # 0.2 to 0.8 worked well in most tasks of Vijayakumar et al. 2016 (1610.02424).
    diversity: float = 0.5

    def __post_init__(self):
        if self.method not in METHODS:
            raise UserError(
                f"method: no decoding method {self.method!r}.{did_you_mean(self.method, METHODS)}"
            )
        for field, valid, rule in (
            ("beams", self.beams >= 1, "must be at least 1"),
            ("length_norm", self.length_norm >= 0, "must not be negative"),
            (
                "temperature",
                self.temperature > 0,
                "must be positive; for the limit 0 use method=greedy",
            ),
            ("top_k", self.top_k >= 0, "must not be negative; 0 is all tokens"),
            ("top_p", 0 < self.top_p <= 1, "is not in (0, 1]"),
            ("min_length", self.min_length >= 0, "must not be negative"),
            (
                "repetition_penalty",
                self.repetition_penalty >= 1,
                "must be at least 1, which is none",
            ),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "must not be negative; 0 is no limit"),
            ("captions", self.captions >= 1, "must be at least 1"),
            ("groups", self.groups >= 1, "must be at least 1"),
            ("diversity", self.diversity >= 0, "must not be negative"),
        ):
            if not valid:
                raise UserError(f"{field}: {getattr(self, field)} {rule}.")
        if self.method == "greedy" and self.captions > 1:
            raise UserError(
                f"captions: greedy decoding has one caption per image, not {self.captions}; use "
                "method=beam or method=sample."
            )
        if self.method == "beam" and self.captions > self.beams:
            raise UserError(
                f"captions: {self.captions} of {self.beams} beams; use beams={self.captions} or "
                "more."
            )
        if self.method == "beam" and self.beams % self.groups:
            raise UserError(f"groups: {self.beams} beams are not divisible by {self.groups}.")

    @property
    def rows(self) -> int:
        """Number of live captions per image, for which the cache is allocated."""
        return {"greedy": 1, "beam": self.beams, "sample": self.captions}[self.method]

    @property
    def described(self) -> str:
        """Readable description of the method and its settings."""
        if self.method == "greedy":
            parts = ["greedy decoding"]
        elif self.method == "beam":
            parts = [f"beam search, {self.beams} beams, log p / tokens ** {self.length_norm:g}"]
        else:
            parts = [
                f"sampling, temperature {self.temperature:g}, top_k {self.top_k}, "
                f"top_p {self.top_p:g}"
            ]
        if self.method == "beam" and self.groups > 1:
            parts.append(f"{self.groups} groups with diversity {self.diversity:g}")
        if self.min_length:
            parts.append(f"at least {self.min_length} tokens")
        if self.repetition_penalty != 1:
            parts.append(f"repetition penalty {self.repetition_penalty:g}")
        if self.no_repeat_ngram:
            parts.append(f"no repeated {self.no_repeat_ngram}-gram")
        if self.captions > 1:
            parts.append(f"{self.captions} captions per image")
        return ", ".join(parts)

    def rules(self, spec: CaptionSpec, prompt_length: jax.Array | int) -> Processor | None:
        """Return the rules on the next token, or None; raises UserError if they cannot hold.

        Args:
            spec: Size and special tokens of the captions.
            prompt_length: int32 [R], or 0 without prompts.
        """
        if self.min_length > spec.length:
            raise UserError(
                f"min_length: {self.min_length} is more than the {spec.length} tokens that a "
                "caption can have (text.length)."
            )
        found = []
        if self.repetition_penalty != 1:
            found.append(processors.repetition_penalty(self.repetition_penalty))
        if self.no_repeat_ngram:
            found.append(processors.no_repeat_ngram(self.no_repeat_ngram))
        if self.min_length:
            found.append(processors.min_length(self.min_length, spec.eos, prompt_length))
        if not found:
            return None
        process = processors.in_turn(found)
        if isinstance(prompt_length, int):
            return process
        return processors.after_prompt(process, prompt_length)
