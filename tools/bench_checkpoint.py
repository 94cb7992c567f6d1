"""Measure the cost of saving a checkpoint every N training steps.

    python tools/bench_checkpoint.py --config=configs/pretrain.py:model=S/16 --config.batch_size=64

Blocks of steps with and without a save alternate. A save counts in full: fingerprints, the copy
from the devices, and the end of writing in the background. Batches are noise on the devices.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from cap_pretrain import learners
from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.distributed import sharding
from cap_pretrain.optim import optimizers, schedule
from cap_pretrain.training.step import init_state, make_train_step
from cap_pretrain.validation import validate

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py[:key=value,…]")
EVERY = flags.DEFINE_integer("every", 50, "Steps between two saves.", lower_bound=1)
ROUNDS = flags.DEFINE_integer("rounds", 5, "Blocks of each kind.", lower_bound=1)
FOLDER = flags.DEFINE_string("folder", None, "Where to save; default: a temporary folder.")


def main(_: list[str]) -> None:
    """Run the benchmark and print its results."""
    logging.set_verbosity(logging.WARNING)
    config = CONFIG.value
    validate(config)
    mesh = sharding.make_mesh(config)
    rate = schedule.learning_rate(config, schedule.make_schedule(config, epoch=config.batch_size))
    init, abstract, graphdef, tx = init_state(
        lambda key: learners.build(config, config.text.vocab_size, key),
        lambda params: optimizers.build(config.optim, params, rate),
        config,
        mesh,
    )
    train_step = make_train_step(
        graphdef, tx, rate, config, jax.tree.map(lambda leaf: leaf.sharding, abstract)
    )
    rng = np.random.default_rng(0)
    b, side = config.batch_size, config.data.image_size
    batch = {
        "image": rng.integers(0, 256, (b, side, side, 3), np.uint8),
        "text": rng.integers(1, config.text.vocab_size, (b, config.text.length), np.int32),
    }
    seconds: dict[bool, list[float]] = {False: [], True: []}
    blocked = []
    with tempfile.TemporaryDirectory(dir=FOLDER.value) as folder, jax.set_mesh(mesh):
        batch = sharding.put_batch(batch, mesh)
        checkpoints = Checkpoints(folder, config)
        checkpoints.prepare(abstract)
        state, _ = train_step(init(), batch)
        for block in range(2 * ROUNDS.value + 1):
            save = bool(block % 2)
            jax.block_until_ready(state)
            begun = time.perf_counter()
            for step in range(EVERY.value):
                state, metrics = train_step(state, batch)
                if save and step == 0:
                    jax.block_until_ready(metrics)
                    before = time.perf_counter()
                    checkpoints.save(state)
                    blocked.append(time.perf_counter() - before)
                checkpoints.check()
            jax.block_until_ready(state)
            checkpoints.wait()
            if block:  # the first block is a warm-up
                seconds[save].append((time.perf_counter() - begun) / EVERY.value)
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
        size /= len(list((Path(folder) / "checkpoints").iterdir()))
        checkpoints.close()
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    plain, saving = (statistics.median(seconds[kind]) for kind in (False, True))
    print(f"state {state_bytes / 1e6:.1f} MB, {size / 1e6:.1f} MB on disk")
    print(f"step {1e3 * plain:.1f} ms without saving, {1e3 * saving:.1f} ms with a save", end=" ")
    print(f"every {EVERY.value} steps: {saving / plain - 1:+.1%} (medians of {ROUNDS.value})")
    print(f"a save blocks the training loop for {1e3 * statistics.median(blocked):.0f} ms")


if __name__ == "__main__":
    sys.exit(app.run(main))
