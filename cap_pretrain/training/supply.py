"""The batches of a run, step by step, on its devices."""

import contextlib
from collections.abc import Iterator

import jax

from cap_pretrain import inputs, learners
from cap_pretrain.distributed import sharding
from cap_pretrain.telemetry.timer import StepTimer
from cap_pretrain.training import feed
from cap_pretrain.training.broken import BrokenList
from cap_pretrain.training.setup import Setup


def supply(
    setup: Setup, start: int, timer: StepTimer, stack: contextlib.ExitStack
) -> tuple[Iterator[tuple[int, dict[str, jax.Array]]], BrokenList]:
    """Return an iterator over the steps after `start`, each with its batch on the devices.

    Also returns the list of images that did not decode, which is a log. `stack` closes both;
    `timer` counts the wait for batches.
    """
    config, total = setup.config, setup.schedule.total
    reads = (*learners.reads(config), "broken")
    reads += ("index",) if config.log.ids else ()
    rows = sharding.batch_rows(setup.mesh, config.batch_size)
    args = (config, setup.mixture, setup.tokenizer, rows, range(start, total))
    batches = feed.prepared_batches(*args, setup.batches.offset, setup.phases)
    stack.callback(batches.close)
    members = [source for source, _ in setup.mixture]
    broken = BrokenList(inputs.view(config), members, setup.workdir, jax.process_index())
    stack.callback(broken.close)

    def iterate() -> Iterator[tuple[int, dict[str, jax.Array]]]:
        for step in range(start + 1, total + 1):
            with timer.data_wait():
                batch = next(batches)
                broken.see(step, batch)
            yield step, sharding.put_batch({k: batch[k] for k in reads}, setup.mesh)

    return iterate(), broken
