"""Configs small enough for tests, and helpers for their run directories."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import inputs, learners
from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.data.text import words
from cap_pretrain.distributed import sharding
from cap_pretrain.optim import optimizers, schedule
from cap_pretrain.training import step

CONFIGS = Path(__file__).parent.parent / "configs"


def load(name: str, arg: str | None = None) -> ConfigDict:
    """Return `get_config` of `configs/NAME.py`, with its argument if there is one."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config() if arg is None else module.get_config(arg)


def shrink(config: ConfigDict, **fields: Any) -> ConfigDict:
    """Shrink a config to run in seconds; `fields` are `a__b=value` for `config.a.b`."""
    config.total_steps = 2
    config.batch_size = 8
    config.dtype = "float32"
    config.model.name = "mu/8"
    for field in ("width", "depth", "mlp", "heads"):
        config.model[field] = 0
    config.data.name = "scenes"
    config.data.image_size = 16
    config.data.scenes.length_train = 200
    config.data.scenes.length_val = 20
    config.text.length = 16
    config.text.vocab_size = 100
    config.log.every_steps = 1
    for field, value in fields.items():
        *sections, last = field.split("__")
        section = config
        for name in sections:
            section = section[name]
        section[last] = value
    return config


def config(learner: str = "captioner", options: dict | None = None, **fields: Any) -> ConfigDict:
    """Return the default config with a learner and its options, shrunk."""
    c = configs.default()
    c.learner = learners.defaults(learner, **(options or {}))
    return shrink(c, **fields)


def lines(workdir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> list[dict[str, float]]:
    """Return the logged metrics of each training step, without times."""
    return [
        {k: v for k, v in line.items() if k == "step" or k.startswith("train/")}
        for line in lines(workdir)
        if "train/loss" in line
    ]


def prepared(c: ConfigDict, vocab_size: int = 100, mesh: Any = None):
    """Return (initial state, its abstract form, graphdef, optimizer, learning rate, mesh)."""
    mesh = mesh or sharding.make_mesh(c)
    rate = schedule.learning_rate(c, schedule.make_schedule(c, epoch=200))
    init, abstract, graphdef, tx = step.init_state(
        lambda key: learners.build(c, vocab_size, key),
        lambda params: optimizers.build(c.optim, params, rate),
        c,
        mesh,
    )
    return init, abstract, graphdef, tx, rate, mesh


_ABSTRACT: dict[tuple[str, int], step.TrainState] = {}  # of the newest config


def abstract_state(c: ConfigDict, vocab_size: int) -> step.TrainState:
    """Return the abstract form of a config's state, which is traced once in a row."""
    key = configs.to_json(c), vocab_size
    if key not in _ABSTRACT:
        _ABSTRACT.clear()
        _ABSTRACT[key] = prepared(c, vocab_size)[1]
    return _ABSTRACT[key]


def saved_state(c: ConfigDict, workdir: Path, vocab_size: int, at: int) -> step.TrainState:
    """Return the state that a run has saved at a step, on this host."""
    abstract = abstract_state(c, vocab_size)
    checkpoints = Checkpoints(workdir, c, read_only=True)
    try:
        return jax.device_get(checkpoints.restore(abstract, at))
    finally:
        checkpoints.close()


def saved_run(c: ConfigDict, workdir: Path, tokenizer_path: Path, *steps: int) -> step.TrainState:
    """Create the workdir of a run with random parameters and a minimal optimizer state.

    Returns the state that is saved at all `steps`. Parameters and their average differ.
    """
    of_words = words.is_words_file(tokenizer_path)
    path = workdir / (inputs.WORDS_FILE if of_words else inputs.TOKENIZER_FILE)
    path.parent.mkdir(parents=True)
    shutil.copyfile(tokenizer_path, path)
    abstract = abstract_state(c, inputs.open_tokenizer(c, path).vocab_size)
    abstract = abstract.replace(opt_state={"count": abstract.step})
    rng = np.random.default_rng(0)

    def draw(leaf):
        return (0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract).replace(
        params=jax.tree.map(draw, abstract.params), ema=jax.tree.map(draw, abstract.ema)
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    (workdir / "config.json").write_text(configs.to_json(c))
    checkpoints = Checkpoints(workdir, c, identity=inputs.tokenizer_identity(workdir))
    for at in steps:
        checkpoints.save(jax.device_put(state.replace(step=np.int32(at)), shardings))
    checkpoints.close()
    return state


def batch(c: ConfigDict, seed: int = 0, vocab_size: int = 100) -> dict[str, np.ndarray]:
    """Return a batch of noise with captions of all lengths from 2, and regions in half of it."""
    rng = np.random.default_rng(seed)
    b, s, t = c.batch_size, c.data.image_size, c.text.length
    text = rng.integers(1, vocab_size, (b, t)).astype(np.int32)
    lengths = 2 + np.arange(b) * (t - 2) // max(b - 1, 1)
    found = {
        "image": rng.integers(0, 256, (b, s, s, 3)).astype(np.uint8),
        "text": np.where(np.arange(t) < lengths[:, None], text, 0),
        "label": np.zeros(b, np.int32),
    }
    if "boxes" in learners.reads(c):
        phrases = rng.integers(1, vocab_size, (b, c.data.regions, t), np.int32)
        phrases *= (np.arange(t) < t // 2) & (np.arange(b)[:, None, None] % 2 == 0)
        corners = np.sort(rng.random((b, c.data.regions, 2, 2), np.float32), axis=2)
        found |= {"phrases": phrases, "boxes": corners.reshape(*phrases.shape[:2], 4)}
    return found


def assert_same(a: Any, b: Any) -> None:
    """Assert that two trees contain the same arrays, bit by bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)
