"""The code in docs/python.md and docs/python.ipynb runs as it is written there."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from cap_pretrain import evals
from cap_pretrain.cli import config_files
from cap_pretrain.commands import program
from tests import quick, toy

DOCS = toy.CONFIGS.parent / "docs"
PAGE = (DOCS / "python.md").read_text(encoding="utf-8")
NOTEBOOK = json.loads((DOCS / "python.ipynb").read_text(encoding="utf-8"))


def test_the_notebook_holds_no_outputs():
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert cells and not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.fixture
def place(tokenizer_path, tmp_path, monkeypatch):
    """A folder with what the page assumes: two runs and photographs. Training compiles at once."""
    for name, learner in (("siglip", "dual_encoder"), ("cappa", "captioner")):
        c = toy.config(learner, model__depth=1, data__image_size=16, text__length=8)
        toy.saved_run(c, tmp_path / "runs" / name, tokenizer_path, 300)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 40, 3), np.uint8)
    (tmp_path / "photos").mkdir()
    for name, image in zip(("photos/dog.jpg", "photos/boat.png", "query.jpg"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    config_of = config_files.config

    def short(text):
        config_of(text)  # raises if there is no such config
        config = toy.config(quick.NAME)
        config.evals = ConfigDict({"val": evals.defaults("loss")})
        return config

    monkeypatch.setattr(config_files, "config", short)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_page(place, capsys):
    code = PAGE.replace('"total_steps": 1000, "batch_size": 64', '"total_steps": 1')
    blocks = re.findall(r"```(python)?\n(.*?)```", code, re.DOTALL)
    names: dict[str, object] = {}
    for language, block in blocks:
        if language:
            exec(compile(block, "docs/python.md", "exec"), names)
            continue
        for line in block.splitlines():
            name, *arguments = shlex.split(line, comments=True)
            assert name == "cap" and program.main(arguments) == 0, line
    assert names["run"].metrics["val/loss"] > 0 and (place / "runs/cap/config.json").is_file()
    assert "Model('runs/siglip': dual_encoder" in capsys.readouterr().out
    assert len(blocks) >= 10


@pytest.mark.slow
def test_the_notebook(tmp_path):
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    (tmp_path / "notebook.py").write_text(code, encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # which would train slowly
    env |= {"PYTHONPATH": str(DOCS.parent), "MPLBACKEND": "agg"}
    subprocess.run([sys.executable, "notebook.py"], check=True, cwd=tmp_path, env=env)
