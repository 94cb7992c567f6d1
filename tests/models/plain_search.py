"""Beam search in groups, with rules on tokens, in plain Python: as `models.beam_search` says."""

import collections
from collections.abc import Callable, Sequence

import numpy as np

from cap_pretrain.models.decoding import Decoding

Logits = Callable[[tuple[int, ...]], np.ndarray]


def ruled(past: Sequence[int], logits: np.ndarray, how: Decoding, *, given: int, eos: int):
    """Return the logits of the token after `past`, of which `given` are a prompt, by the rules."""
    allowed, size = logits.copy(), how.no_repeat_ngram
    for token in set(past):
        factor = 1 / how.repetition_penalty if logits[token] > 0 else how.repetition_penalty
        allowed[token] = logits[token] * factor
    grams = {tuple(past[i : i + size]) for i in range(len(past) - size + 1)} if size else ()
    for token in range(len(logits)):
        if size and (*past, token)[len(past) + 1 - size :] in grams:
            allowed[token] = -np.inf
    if len(past) - given < how.min_length:
        allowed[eos] = -np.inf
    return allowed


def search(logits_of: Logits, how: Decoding, *, length: int, prompt=(), eos: int = 1):
    """Return the captions and their log-probabilities, best first, of one image."""
    beams, given = how.beams // how.groups, len(prompt)
    kept = min(beams, how.captions)
    groups = [
        {"live": [(0.0, 0.0, tuple(prompt))], "found": [], "complete": 0, "done": False}
        for _ in range(how.groups)
    ]
    for n in range(given + 1, length + 1):
        chosen = collections.Counter()
        for group in groups:
            ranked = _ranked(group["live"], logits_of, how, chosen, given, eos)
            was_done = group["done"]
            for score, log_p, caption in [] if was_done else ranked[:beams]:
                if caption[-1] == eos or n == length:
                    final = score / (n - given) ** how.length_norm
                    group["found"].append((final, log_p, caption))
                    group["complete"] += 1
            group["found"] = sorted(group["found"], reverse=True)[:kept]
            group["live"] = [c for c in ranked if c[2][-1] != eos][:beams]
            if not was_done:
                chosen.update(caption[-1] for *_, caption in group["live"])
            bound = group["live"][0][0] / (length - given) ** how.length_norm
            enough = len(group["found"]) == kept and bound <= group["found"][-1][0]
            group["done"] = was_done or group["complete"] >= beams or enough
    ordered = []
    for rank in range(kept):
        ordered += sorted(
            (g["found"][rank] for g in groups if len(g["found"]) > rank), reverse=True
        )
    first = {caption: (caption, log_p) for _, log_p, caption in reversed(ordered)}
    again = [o for i, o in enumerate(ordered) if o[2] in {p[2] for p in ordered[:i]}]
    distinct = [o for i, o in enumerate(ordered) if o[2] not in {p[2] for p in ordered[:i]}]
    assert len(first) == len(distinct)
    return [(caption, log_p) for _, log_p, caption in (distinct + again)[: how.captions]]


def _ranked(live, logits_of, how, chosen, given, eos):
    """Return all continuations of live captions, the best first."""
    ranked = []
    for score, log_p, past in live:
        logits = np.asarray(logits_of(past), np.float64)
        whole = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max()
        allowed = ruled(past, logits, how, given=given, eos=eos)
        for token, logit in enumerate(allowed):
            more = logit - how.diversity * chosen[token] * (how.groups > 1) - whole
            if more > -np.inf:
                ranked.append((score + more, log_p + logits[token] - whole, (*past, token)))
    ranked.sort(reverse=True)
    scores = [score for score, *_ in ranked[: 2 * how.beams + 1]]
    assert np.min(-np.diff(scores)) > 1e-5  # rounding must not decide
    return ranked
