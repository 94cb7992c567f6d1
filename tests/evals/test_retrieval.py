"""Retrieval against brute force, with ties, several captions, broken images and blocks."""

import numpy as np
import pytest

from cap_pretrain.errors import UserError
from cap_pretrain.evals.retrieval import Counts, Retrieval
from tests import tiny
from tests.evals import stubs

CAPTIONS = [["0 1", "0 2"], ["1"], ["2 1", "2 2", "2 3", "2 4"], [], ["4"], ["5 9", "5 9"]] + [
    [f"{k} 1", f"{k}"] for k in range(6, 17)
]


def measured(learner, captions=CAPTIONS, broken=(), **options):
    context, variables = stubs.context(learner, stubs.Pictures(captions, broken=broken))
    return Retrieval(context, Retrieval.Options(**options))(variables)


def chances(scores, right, k):
    """Return how often a right one is among the first k, over 200 random orders of ties."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        order = np.lexsort((rng.random(len(scores)), -scores))
        hits += right[order[:k]].any()
    return hits / 200


def brute_force(scores, owner):
    """Return R@k from the whole matrix [N, M]; images without captions are left out."""
    metrics = {}
    for k in (1, 5, 10):
        rows = [chances(row, owner == i, k) for i, row in enumerate(scores) if (owner == i).any()]
        columns = [
            chances(column, np.arange(len(scores)) == i, k)
            for column, i in zip(scores.T, owner, strict=True)
        ]
        metrics |= {f"image_to_text_r{k}": np.mean(rows), f"text_to_image_r{k}": np.mean(columns)}
    return metrics


def test_an_oracle_finds_everything_and_a_constant_guesses():
    metrics = measured(stubs.Oracle, batch_size=3).metrics
    assert metrics.pop("text_to_image_mean_rank") == metrics.pop("image_to_text_mean_rank") == 1.0
    assert len(metrics) == 6 and set(metrics.values()) == {1.0}

    metrics = measured(stubs.Constant, batch_size=3).metrics
    own = [len(captions) for captions in CAPTIONS if captions]
    texts = sum(own)
    assert metrics["text_to_image_r5"] == pytest.approx(5 / 17)
    assert metrics["text_to_image_mean_rank"] == pytest.approx(9)
    assert metrics["image_to_text_r1"] == pytest.approx(np.mean(own) / texts)
    expected = np.mean([(texts + 1) / (n + 1) for n in own])  # of the first of n among `texts`
    assert metrics["image_to_text_mean_rank"] == pytest.approx(expected)

    metrics = measured(stubs.Diverged).metrics
    assert {v for k, v in metrics.items() if "rank" not in k} == {0.0}


def test_metrics_are_those_of_brute_force_with_ties_and_several_captions():
    learner = stubs.Hashed()
    encode = stubs.Numbers().encode
    owner = np.repeat(np.arange(len(CAPTIONS)), [len(own) for own in CAPTIONS])
    tokens = np.stack([encode(text) for own in CAPTIONS for text in own])
    images = np.arange(len(CAPTIONS))[:, None]
    scores = np.asarray(learner.compare(images, learner.text_features(tokens)))
    assert len(np.unique(scores)) < 8 and scores.shape == (17, len(tokens))
    expected = brute_force(scores, owner)
    for size in (1, 3, 17):
        result = measured(stubs.Hashed, batch_size=size)
        assert result.details["images"] == 16 and result.details["captions"] == len(tokens)
        for name, value in expected.items():
            assert result.metrics[name] == pytest.approx(value, abs=0.03), name


def test_broken_images_are_no_candidates_nor_their_captions():
    whole, part = measured(stubs.Constant), measured(stubs.Constant, broken=[0, 2], batch_size=4)
    assert part.details["images"] == whole.details["images"] - 2
    assert part.details["captions"] == whole.details["captions"] - 6
    assert part.metrics["text_to_image_r5"] == pytest.approx(5 / 15)  # of 17
    with pytest.raises(UserError, match="no image that can be decoded"):
        measured(stubs.Constant, broken=range(17))


def test_limit_takes_the_first_images_with_all_their_captions():
    result = measured(stubs.Oracle, limit=3)
    assert (result.details["images"], result.details["captions"]) == (3, 7)


def test_data_without_captions_is_the_users_mistake():
    with pytest.raises(UserError, match="has no captions"):
        measured(stubs.Oracle, [[], []])


def test_what_is_taken_off_the_scores_only_has_a_say_in_rows():
    rng = np.random.default_rng(0)
    owner, scores = np.repeat(np.arange(4), 2), rng.random((4, 8)).astype(np.float32)
    prior = rng.random(8).astype(np.float32)

    def metrics(scores, offsets):
        counts = Counts(owner, scores[owner, np.arange(8)], 1e-6)
        for k in (0, 2):
            counts.add(np.arange(k, k + 2), scores[k : k + 2], offsets)
        return counts.metrics()

    found = metrics(scores, {"": 0.0, "_over_prior": prior})
    plain, moved = metrics(scores, {"": 0.0}), metrics(scores - prior, {"": 0.0})
    assert len(found) == 12
    for name, value in plain.items():
        assert found[name] == value
    for name, value in moved.items():
        if name.startswith("image_to_text"):
            assert found[f"{name}_over_prior"] == pytest.approx(value)
    assert moved != plain


@pytest.mark.parametrize("kind", ["captioner", "dual_encoder"])
def test_scores_are_the_learners_whatever_the_blocks(kind, tokenizer_path):
    context, variables = stubs.small(kind, tokenizer_path, data__scenes__length_val=7)
    results = [
        Retrieval(context, Retrieval.Options(batch_size=size, pairs=pairs))(variables)
        for size, pairs in ((2, 8), (7, 1000))
    ]
    assert results[0].metrics == results[1].metrics
    source = context.source()
    images = np.stack([source[i]["image"] for i in range(7)])
    tokens = np.stack(
        [context.tokenizer.encode(t) for i in range(7) for t in source[i]["captions"]]
    )
    score = tiny.jitted((context.graphdef, *variables), lambda x, i, t: x.score(i, t))
    blank = np.full((1, *images.shape[1:]), 128, np.uint8)
    every = np.broadcast_to(tokens, (8, *tokens.shape))
    scores = np.asarray(score(np.concatenate([images, blank]), every))
    owner = np.repeat(np.arange(7), 5)
    metrics = results[0].metrics
    for name, value in brute_force(scores[:7], owner).items():
        assert metrics[name] == pytest.approx(value, abs=0.02), name
    if kind == "captioner":
        for name, value in brute_force(scores[:7] - scores[7], owner).items():
            if name.startswith("image_to_text"):
                assert metrics[f"{name}_over_prior"] == pytest.approx(value, abs=0.02), name
    assert len(metrics) == (12 if kind == "captioner" else 8)


def test_captions_that_tie_for_their_tokens_are_counted_and_told():
    long = "1 2 3 4 5 6 7"  # the tokenizer keeps seven numbers
    result = measured(stubs.Constant, [[f"{long} 8", "3"], [f"{long} 9"], ["3", "4"]])
    assert result.details["tied_captions"] == 2 and result.details["captions"] == 5
    assert result.lines[0].startswith("2 captions tie, since others have the same tokens, such as")
    assert measured(stubs.Constant, [["3"], ["3"], ["4"]]).lines == ()  # equal as they are
