"""Evaluation batches show every example once, in order."""

import numpy as np
import pytest

from cap_pretrain.data.pipeline import eval_batches
from cap_pretrain.data.prefetch import iterate
from cap_pretrain.data.views import View
from tests.data.numbers import SIZE, Numbers, assert_same, rows_of_host


@pytest.mark.parametrize(
    ("count", "limit", "shown"), [(10, None, 10), (8, None, 8), (30, 9, 9), (3, 9, 3)]
)
def test_evaluation_shows_every_example_once(tokenizer, count, limit, shown):
    def batches(**options):
        return eval_batches(
            Numbers(count, files=True),
            tokenizer,
            view=View(SIZE),
            batch_size=4,
            limit=limit,
            **options,
        )

    whole = batches()
    assert len(whole) == -(-shown // 4)
    got = list(iterate(whole))
    mask = np.concatenate([batch["mask"] for batch in got])
    assert mask.tolist() == [True] * shown + [False] * (len(whole) * 4 - shown)
    assert np.concatenate([b["label"] for b in got])[mask].tolist() == list(range(shown))
    assert np.concatenate([b["index"] for b in got])[mask].tolist() == list(range(shown))
    texts = [tokenizer.decode(row) for b in got for row in b["text"][b["mask"]]]
    assert texts == [f"{i} a" for i in range(shown)]
    for batch in got:
        assert batch["image"].shape == (4, SIZE, SIZE, 3)
        for x in batch.values():
            assert not x[~batch["mask"]].any()
    for hosts in (2, 4):
        parts = [list(iterate(batches(rows=rows_of_host(host, hosts, 4)))) for host in range(hosts)]
        for j, batch in enumerate(got):
            together = {k: np.concatenate([part[j][k] for part in parts]) for k in batch}
            assert_same(together, batch)


def test_evaluation_masks_broken_images(tokenizer):
    (batch,) = eval_batches(Numbers(4, broken=(2,)), tokenizer, view=View(SIZE), batch_size=4)
    assert batch["mask"].tolist() == [True, True, False, True]
    assert batch["broken"].tolist() == [False, False, True, False]
    assert batch["label"].tolist() == [0, 1, 2, 3]


def test_evaluation_crops_the_centre(tokenizer):
    def first(crop):
        source = Numbers(1, 240, files=True)
        return eval_batches(source, tokenizer, view=View(SIZE, crop), batch_size=1)[0]["image"]

    # The image is wider than high and darkest at the left edge, outside of a centered square.
    assert first("center")[0, 0, 0, 0] > first("none")[0, 0, 0, 0]
