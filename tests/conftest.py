"""Tests run on the CPU, offline, and compile each program once."""

import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little: these flags cut compile time to a third. Each flag is
# there once, since they are part of the key of the compilation cache.
os.environ["XLA_FLAGS"] = " ".join(
    dict.fromkeys(
        [
            *os.environ.get("XLA_FLAGS", "").split(),
            "--xla_backend_optimization_level=0",
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
    )
)

import jax
import pytest
from absl import flags

from cap_pretrain.data.scenes.source import Scenes
from cap_pretrain.data.text.tokenizers import source_captions, train_sentencepiece
from tests import gcs

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # worker processes ask for it


# Compiled programs are kept for the whole session, in one folder that its processes share: a rerun
# of a workdir need not compile again. A folder that the environment names outlasts the session.
CACHE = {
    "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR", ""),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


def pytest_configure(config):
    """Set up the compilation cache of this process and, by the environment, of those it starts."""
    if not CACHE["jax_compilation_cache_dir"]:
        CACHE["jax_compilation_cache_dir"] = folder = tempfile.mkdtemp(prefix="compiled-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    for name, value in CACHE.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


# A file runs in one process (--dist loadfile): the longest start first, so that all end together.
# The first group is long in the slow tests, the second in the default ones.
LONGEST = (
    "tools/test_kill_and_resume.py",
    "distributed/test_layouts.py",
    "distributed/test_multihost.py",
    "configs/test_pretext_recipes.py",
    "distributed/test_compile_cache.py",
    "configs/test_recurrent_recipes.py",
    "evals/test_check.py",
    "tools/test_sweep.py",
    "docs/test_walk.py",
    "api/test_documented.py",
    "distributed/test_gpu.py",
    "checkpoints/test_full_disk.py",
    "configs/test_captioning_tasks.py",
    "training/test_same_curve.py",
    "learners/test_frozen.py",
    "models/test_convnets.py",
    "test_train.py",
    "checkpoints/test_warm_start.py",
    "learners/test_recurrent.py",
    "models/test_layers.py",
    "tools/test_launch_tpu.py",
    "optim/test_optimizers.py",
    "configs/test_golden_configs.py",
    "tools/test_caption.py",
    "tools/test_show_attention.py",
    "training/test_steady_state.py",
    "tools/test_extract_features.py",
    "learners/test_classifier.py",
    "models/test_recurrent.py",
    "learners/test_captioner.py",
    "evals/test_caption_metrics.py",
    "data/test_prefetch.py",
    "checkpoints/test_checkpoint.py",
    "models/test_beam_search.py",
    "evals/test_captions_devices.py",
    "evals/test_devices.py",
    "learners/test_pairs.py",
)


def pytest_collection_modifyitems(config, items):
    """Move the longest files to the front."""
    ranks = {config.rootpath / "tests" / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_addoption(parser):
    parser.addoption(
        "--update_golden", action="store_true", help="write tests/golden/ anew instead of comparing"
    )


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    """A sentencepiece model of about a hundred pieces, made from captions of `scenes`."""
    captions = source_captions(Scenes("train", 16, length_train=200), 200)
    return train_sentencepiece(captions, tmp_path_factory.mktemp("tokenizer"), vocab_size=100)


@pytest.fixture
def bucket(monkeypatch):
    """A server with the empty bucket gs://bucket, which this process and its children use."""
    with gcs.Server("bucket") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
