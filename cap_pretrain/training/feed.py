"""The batches of training: their order, their sizes and how they are prepared."""

import bisect
from collections.abc import Sequence
from typing import NewType

import grain
import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import inputs
from cap_pretrain.data import blocks, pipeline, prefetch, resolution
from cap_pretrain.data.origins import Origins
from cap_pretrain.data.sources import buckets, subset
from cap_pretrain.data.text import tokenizers
from cap_pretrain.models import build
from cap_pretrain.telemetry import console
from cap_pretrain.training.phases import Phase

TrainingMixture = NewType("TrainingMixture", inputs.Mixture)
"""A mixture from `in_buckets`, the only function that makes one, as training needs it."""

Order = buckets.Order | blocks.BlockOrder | None  # None: a shuffle of all examples
Rows = Sequence[int] | np.ndarray | None  # of a batch; None: all


def in_buckets(
    config: ConfigDict, mixture: inputs.Mixture, tokenizer: tokenizers.Tokenizer | None
) -> TrainingMixture:
    """Group the captions of a mixture by their length in tokens if `data.buckets` is set.

    The result has one dataset per length, for which every record is read once. Without
    `data.buckets`, `mixture` is returned, and `tokenizer` may be None.
    """
    if not (config.data.buckets and mixture):
        return TrainingMixture(mixture)
    assert tokenizer is not None
    with console.doing(f"Grouping the captions of {inputs.images_of(mixture)} by length"):
        groups = [group for source, _ in mixture for group in buckets.by_length(source, tokenizer)]
    return TrainingMixture([(group, 1.0) for group in groups])


def examples_an_epoch(config: ConfigDict, mixture: TrainingMixture) -> int:
    """Return the number of examples in an epoch."""
    order = _order(config, mixture) if mixture else None
    return sum(len(source) for source, _ in mixture) if order is None else order.examples


def describe(config: ConfigDict, mixture: TrainingMixture, rows: Rows = None) -> list[str]:
    """Return lines for the log about the buckets, subsets and blocks in a mixture.

    `rows` are those of a batch that this host loads, if it is known.
    """
    if config.data.buckets and mixture:
        return [buckets.describe(_length_groups(mixture), config.batch_size)]
    parts = [source for source, _ in mixture if isinstance(source, subset.Subset)]
    lines = [f"Part of a dataset: {source}: {len(source):,} examples." for source in parts]
    order = _order(config, mixture) if mixture else None
    return lines + (order.describe(rows) if isinstance(order, blocks.BlockOrder) else [])


def _order(config: ConfigDict, mixture: TrainingMixture, offset: int = 0) -> Order:
    """Return the order of batches of one length or of blocks, or None for a global shuffle."""
    data = config.data
    if data.buckets:
        return buckets.Order(_length_groups(mixture), config.batch_size, config.seed)
    if data.order != "blocks":
        return None
    layout = blocks.Layout(data.block, data.lanes, data.cache_gb)
    kwargs = dict(batch_size=config.batch_size, seed=config.seed, offset=offset)
    return blocks.BlockOrder(mixture, layout, **kwargs)


def _length_groups(mixture: TrainingMixture) -> list[buckets.PairsOfOneLength]:
    """Return the datasets of a mixture that is grouped by caption length."""
    groups = [source for source, _ in mixture if isinstance(source, buckets.PairsOfOneLength)]
    if len(groups) != len(mixture):
        raise TypeError("with data.buckets, a mixture must come from in_buckets")
    return groups


def training_batches(
    config: ConfigDict,
    mixture: TrainingMixture,
    tokenizer: tokenizers.Tokenizer,
    rows: Rows = None,
    offset: int = 0,
    order: Order = None,
    total: int = 0,
) -> grain.MapDataset:
    """Return an endless dataset whose element t is batch t, or the given `rows` of it.

    The config is that of the phase to which the batch belongs. Batch 0 begins with row `offset` of
    the run, see `schedule.BatchSizes`. `order` is by default that of the config. The run has
    `total` rows, on which weights of captions may depend; 0 keeps those of its beginning.
    """
    order = order or _order(config, mixture, offset)
    if offset:
        rows = [offset + int(row) for row in (range(config.batch_size) if rows is None else rows)]
    return pipeline.train_dataset(
        mixture,
        tokenizer,
        pipeline.ImageOptions(
            resolution.training_side(config),
            config.data.crop,
            config.data.flip,
            inputs.regions_read(config),
            build.patch_of(config),
        ),
        batch_size=config.batch_size,
        seed=config.seed,
        order=order,
        origins=Origins.of(config.data, total),
        rows=rows,
    )


def prepared_batches(
    config: ConfigDict,
    mixture: TrainingMixture,
    tokenizer: tokenizers.Tokenizer,
    rows: Sequence[int] | np.ndarray,
    steps: range,
    offset: int = 0,
    phases: Sequence[Phase] = (),
) -> prefetch.Batches:
    """Iterate over the elements `steps` of `training_batches`, which are prepared ahead of time.

    The last of them ends the run. Each is made with the config of its phase, by default `config`.
    With `data.order=blocks`, the sources learn what is read next.
    """
    order, plan = _order(config, mixture, offset), None
    if isinstance(order, blocks.BlockOrder):
        plan = blocks.ReadAhead(order, [source for source, _ in mixture], rows)
    total = offset + steps.stop * config.batch_size
    args = (mixture, tokenizer, rows, offset, order, total)
    datasets = [training_batches(phase.config, *args) for phase in phases]
    if len(datasets) > 1:
        in_turn = _InTurn(datasets, [phase.stop for phase in phases])
        dataset = grain.MapDataset.range(steps.stop).map(in_turn)
    else:
        dataset = datasets[0] if datasets else training_batches(config, *args)
    workers = config.data.workers
    return prefetch.iterate(dataset, steps.start, steps.stop, workers=workers, plan=plan)


class _InTurn:
    """A function from the number of a batch to the batch, taken from the dataset of its phase."""

    def __init__(self, datasets: Sequence[grain.MapDataset], stops: Sequence[int]):
        self._datasets, self._stops = datasets, stops

    def __call__(self, number: int) -> pipeline.Row:
        return self._datasets[bisect.bisect_right(self._stops, number)][number]
