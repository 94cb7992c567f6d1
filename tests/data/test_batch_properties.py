"""Properties of training batches, checked on random cases with fixed seeds.

Batch t is the same for any number of hosts, workers and threads, after a resume at any step, and
for any mixture.
"""

import contextlib
import dataclasses
import random

import numpy as np
import pytest

from cap_pretrain.data.pipeline import ImageOptions, train_dataset
from cap_pretrain.data.prefetch import iterate
from cap_pretrain.data.text.tokenizers import NoText
from tests.data.numbers import SIZE, Numbers, assert_same, rows_of_host


@dataclasses.dataclass
class Case:
    """A run on a mixture whose members may be exhausted long before others."""

    sizes: list[int]
    weights: list[float]
    options: dict
    image: ImageOptions
    start: int

    @classmethod
    def draw(cls, seed: int) -> "Case":
        draw = random.Random(seed)
        members = draw.randint(1, 4)
        return cls(
            sizes=[draw.choice([7, 12, 30, 100]) for _ in range(members)],
            weights=[draw.choice([0.1, 0.5, 1, 3, 10]) for _ in range(members)],
            options={
                "batch_size": 4 * draw.randint(1, 6),
                "seed": draw.randrange(1000),
            },
            image=ImageOptions(
                SIZE, crop=draw.choice(["none", "random", "window"]), flip=draw.random() < 0.5
            ),
            start=draw.choice([0, 1, 5, 17, 366_499]),
        )

    def dataset(self, host: int = 0, hosts: int = 1):
        sources = [
            Numbers(size, offset=50 * k, broken=(3,) if size > 3 else ())
            for k, size in enumerate(self.sizes)
        ]
        return train_dataset(
            list(zip(sources, self.weights, strict=True)),
            NoText(),
            self.image,
            rows=rows_of_host(host, hosts, self.options["batch_size"]),
            **self.options,
        )

    def batches(self, count: int = 3, hosts: int = 1, **options) -> list[dict]:
        """Return `count` batches from `start` on, joined from all hosts, each read separately."""
        stop = self.start + count
        read = []
        for host in range(hosts):
            with contextlib.closing(
                iterate(self.dataset(host, hosts), self.start, stop, **options)
            ) as got:
                read.append(list(got))
        return [
            {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            for parts in zip(*read, strict=True)
        ]


def assert_all_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert_same(batch, other)


@pytest.mark.parametrize("seed", range(6))
def test_hosts_threads_and_where_a_run_began_change_nothing(seed):
    case = Case.draw(seed)
    dataset = case.dataset()
    expected = [dataset[t] for t in range(case.start, case.start + 3)]
    for hosts in (1, 2, 4):
        assert_all_same(case.batches(hosts=hosts, threads=(seed + hosts) % 3), expected)
    resumed = dataclasses.replace(case, start=case.start + 2)
    assert_all_same(resumed.batches(1, hosts=2, threads=0), expected[2:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "workers", "hosts"), [(20, 1, 2), (21, 2, 1), (22, 2, 2), (23, 1, 4)]
)
def test_worker_processes_change_nothing_either(seed, workers, hosts):
    case = Case.draw(seed)
    assert_all_same(case.batches(5, hosts, workers=workers), case.batches(5, threads=0))


@pytest.mark.parametrize("seed", range(40, 45))
def test_members_of_a_mixture_keep_weight_and_epochs_when_others_are_exhausted(seed):
    case = dataclasses.replace(Case.draw(seed), start=0)
    steps = -(-150 // case.options["batch_size"])
    drawn = np.concatenate([batch["index"] for batch in case.batches(steps, threads=0)])
    shares = np.array(case.weights) / sum(case.weights)
    first = 0
    for size, expected in zip(case.sizes, shares, strict=True):
        own = drawn[(first <= drawn) & (drawn < first + size)] - first
        # Within 1% of all, because Grain rounds weights.
        assert abs(len(own) - expected * len(drawn)) <= 0.01 * len(drawn) + 1
        for start in range(0, len(own), size):
            epoch = own[start : start + size].tolist()
            assert len(set(epoch)) == len(epoch), "no example repeats within an epoch"
        first += size
