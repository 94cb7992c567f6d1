"""Rules on the next token, against their definitions in numpy and against transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cap_pretrain.errors import UserError
from cap_pretrain.models import processors
from cap_pretrain.models.decoding import CaptionSpec, Decoding, restrict
from tests import parity

VOCAB, LENGTH, ROWS, EOS = 7, 12, 40, 1


def captions(seed=0):
    """Return random tokens [ROWS, LENGTH], logits [ROWS, VOCAB] and prompt lengths [ROWS]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    logits = (3 * rng.standard_normal((ROWS, VOCAB))).astype(np.float32)
    return tokens, logits, rng.integers(0, 4, ROWS).astype(np.int32)


def penalized(past, logits, penalty):
    changed = logits.copy()
    for token in set(past):
        changed[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    return changed


def without_repetition(past, logits, size):
    changed = logits.copy()
    for token in range(VOCAB):
        new = (*past, token)[-size:]
        grams = {tuple(past[i : i + size]) for i in range(len(past) - size + 1)}
        if len(new) == size and new in grams:
            changed[token] = -np.inf
    return changed


def not_yet_over(past, logits, least, prompt):
    changed = logits.copy()
    if len(past) - prompt < least:
        changed[EOS] = -np.inf
    return changed


@pytest.mark.parametrize("size", [1, 3, 20])
def test_rules_are_those_of_numpy_at_every_position(size):
    tokens, logits, prompts = captions()
    rules = processors.in_turn(
        [
            processors.repetition_penalty(1.7),
            processors.no_repeat_ngram(size),
            processors.min_length(6, EOS, jnp.asarray(prompts)),
        ]
    )
    process, changes = jax.jit(rules), 0
    for position in range(LENGTH):
        found = np.asarray(process(tokens, position, logits))
        for row, prompt in enumerate(prompts):
            past = tokens[row, :position].tolist()
            expected = penalized(past, logits[row], np.float32(1.7))
            expected = without_repetition(past, expected, size)
            expected = not_yet_over(past, expected, 6, prompt)
            np.testing.assert_allclose(found[row], expected, rtol=1e-6)
        changes += np.sum(found != logits)
    assert changes > ROWS * LENGTH


def test_a_prompt_is_left_as_it_is():
    tokens, logits, prompts = captions()
    process = jax.jit(processors.after_prompt(processors.no_repeat_ngram(1), jnp.asarray(prompts)))
    for position in range(1, 5):
        found = process(tokens, position, logits) != logits
        np.testing.assert_array_equal(np.any(found, axis=1), position >= prompts)


SPEC = CaptionSpec(batch=ROWS, length=LENGTH, start=0, eos=EOS)


def test_only_what_is_asked_for_is_computed():
    assert Decoding(top_k=3, captions=1).rules(SPEC, 0) is None
    with pytest.raises(UserError, match="min_length: 13 is more than the 12 tokens"):
        Decoding(min_length=13).rules(SPEC, 0)


@pytest.mark.slow  # importing transformers takes seconds
@pytest.mark.parity
@pytest.mark.parametrize("prompt", [0, 3])
def test_rules_are_those_of_transformers(prompt):
    torch = parity.require("torch")
    reference = parity.require("transformers").generation
    tokens, logits, _ = captions(1)
    cases = [
        ({"repetition_penalty": 1.3}, reference.RepetitionPenaltyLogitsProcessor(1.3)),
        ({"no_repeat_ngram": 1}, reference.NoRepeatNGramLogitsProcessor(1)),
        ({"no_repeat_ngram": 2}, reference.NoRepeatNGramLogitsProcessor(2)),
        ({"no_repeat_ngram": 3}, reference.NoRepeatNGramLogitsProcessor(3)),
        (
            {"min_length": 5},
            reference.MinNewTokensLengthLogitsProcessor(prompt, 5, EOS),
        ),
        ({"min_length": 5}, reference.MinLengthLogitsProcessor(prompt + 5, EOS)),
    ]
    together = reference.LogitsProcessorList([cases[0][1], cases[2][1], cases[4][1]])
    cases.append(({"repetition_penalty": 1.3, "no_repeat_ngram": 2, "min_length": 5}, together))
    for options, theirs in cases:
        ours = jax.jit(Decoding(**options).rules(SPEC, jnp.full(ROWS, prompt)))
        # Hugging Face's rules are given at least one token, the start.
        for position in range(max(prompt, 1), LENGTH):
            written = torch.from_numpy(tokens[:, :position].astype(np.int64))
            expected = theirs(written, torch.from_numpy(logits.copy())).numpy()
            found = np.asarray(ours(tokens, position, logits))
            np.testing.assert_array_equal(found == -np.inf, expected == -np.inf)
            np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.slow  # importing transformers takes seconds
@pytest.mark.parity
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.3},
        {"top_k": 3},
        {"top_p": 0.2},
        {"top_p": 0.8},
        {"temperature": 1.7, "top_k": 4, "top_p": 0.7},
    ],
)
def test_restrictions_are_those_of_transformers(options):
    torch = parity.require("torch")
    reference = parity.require("transformers").generation
    makers = {
        "temperature": reference.TemperatureLogitsWarper,
        "top_k": reference.TopKLogitsWarper,
        "top_p": reference.TopPLogitsWarper,
    }
    theirs = reference.LogitsProcessorList([makers[k](v) for k, v in options.items()])
    logits = captions(2)[1]
    expected = theirs(None, torch.from_numpy(logits.copy())).numpy()
    found = np.asarray(restrict(jnp.asarray(logits), **options))
    np.testing.assert_array_equal(found == -np.inf, expected == -np.inf)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_length": -1}, "min_length: -1 must not be negative"),
        ({"repetition_penalty": 0.9}, "repetition_penalty: 0.9 must be at least 1"),
        ({"no_repeat_ngram": -2}, "no_repeat_ngram: -2"),
        ({"captions": 0}, "captions: 0 must be at least 1"),
        ({"captions": 3}, "captions: greedy decoding has one caption per image, not 3"),
        ({"captions": 5, "method": "beam"}, "captions: 5 of 4 beams; use beams=5 or more"),
        ({"groups": 3, "method": "beam"}, "groups: 4 beams are not divisible by 3"),
        ({"diversity": -0.1}, "diversity: -0.1 must not be negative"),
    ],
)
def test_options_that_cannot_be_are_explained(options, message):
    with pytest.raises(UserError, match=message):
        Decoding(**options)


def test_the_description_names_every_setting_that_differs():
    plain = Decoding("beam")
    changed = dict(min_length=3, repetition_penalty=1.2, no_repeat_ngram=2, captions=2, groups=2)
    for field, value in changed.items():
        assert dataclasses.replace(plain, **{field: value}).described != plain.described
