"""Real processes train on the same examples in the order of blocks, however many they are."""

import os
import re
import runpy
import shutil
import socket
import subprocess
import sys

import pytest

from cap_pretrain import train
from tests import toy
from tests.data.test_sources import write

STEPS, RESUMED = 200, 150
CONFIG = """
from tests import toy

def get_config():
    return toy.config(
        "rotation",
        **{"data__image_size": 16, "model__depth": 1, "model__width": 16, "model__mlp": 16},
        **{"data__name": NAME, "data__scenes__length_train": 83, "data__order": "blocks"},
        **{"data__block": 4, "data__lanes": 8, "data__cache_gb": 3e-4, "batch_size": 16},
        **{"total_steps": STEPS, "checkpoint__every_steps": RESUMED, "log__ids": True},
        **{"checkpoint__every_minutes": 0.0, "eval__every_share": 0.0},
    )
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file with a mixture of a stored dataset of three files and a generated one."""
    from tensorflow_datasets import features as f

    root = tmp_path_factory.mktemp("config")
    example = lambda i: {"captions": [f"number {i}"]}
    features = {"image": f.Image(), "captions": f.Sequence(f.Text())}
    stored = write(root, "stored", features, example, {"train": 250, "val": 8}, shards=3)
    path = root / "config.py"
    names = {"NAME": repr(f"{stored}:0.7+scenes:0.3"), "STEPS": STEPS, "RESUMED": RESUMED}
    path.write_text(re.sub("|".join(names), lambda name: str(names[name[0]]), CONFIG))
    return path


def start(config, workdir, processes: int) -> str:
    """Train with so many processes; return what the first one printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "cap_pretrain.main", f"--config={config}"]
    command += [f"--workdir={workdir}", f"--coordinator_address={address}"]
    started = [
        subprocess.Popen(
            [*command, f"--num_processes={processes}", f"--process_id={number}"],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            cwd=toy.CONFIGS.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]
    printed = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * processes, printed
    return printed[0]


def ids(workdir) -> list[float]:
    """Return data/ids of all steps."""
    found = {line["step"]: line["data/ids"] for line in toy.lines(workdir) if "data/ids" in line}
    assert list(found) == list(range(1, STEPS + 1))
    return list(found.values())


@pytest.mark.slow
def test_any_number_of_processes_trains_on_the_same_batches(config, tmp_path, capsys):
    train.run(runpy.run_path(str(config))["get_config"](), tmp_path / "1")
    (line,) = re.findall(r"Order: .*", capsys.readouterr().out)
    assert line.startswith("Order: blocks of 4, 8 lanes, windows of 3 and 1 blocks;"), line
    expected = ids(tmp_path / "1")
    assert len(set(expected)) == STEPS
    start(config, tmp_path / "2", 2)
    assert ids(tmp_path / "2") == expected
    # The last checkpoint is lost, so four processes resume in the middle.
    shutil.rmtree(tmp_path / "2" / "checkpoints" / str(STEPS))
    assert f"Resuming from step {RESUMED}" in start(config, tmp_path / "2", 4)
    assert ids(tmp_path / "2") == expected
