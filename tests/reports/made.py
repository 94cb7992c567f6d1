"""Workdirs of runs that never ran, with every file that a report reads."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import config as configs
from cap_pretrain import evals
from cap_pretrain.evals import exhibits
from cap_pretrain.evals.exhibits import Exhibit, Line, Panel
from tests import toy

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;\x07\ud800"


def lines(steps: int = 300, rate: float = 1.0) -> list[dict]:
    """Return lines of metrics.jsonl: a loss that falls, one spike, evaluations each 100 steps."""
    found = []
    for step in range(1, steps + 1):
        loss = 4 * np.exp(-rate * step / steps) + 0.1 * np.sin(step)
        found.append({"step": step, "train/loss": loss, "train/learning_rate": 1e-3})
        found[-1] |= {"time/step_ms": 20.0, "time/images_per_s": 400.0, "time/data_wait_share": 0.1}
        if step % 100 == 0:
            found.append({"step": step, "val/loss": loss + 0.2, "val/token_accuracy": step / 1000})
    found.insert(150, {"step": 150, "spike/loss": 9.0, "spike/median": 2.0})
    return found


def workdir(
    folder: Path, text: str = "a red square", side: int = 16, rotated: bool = False, **fields
) -> Path:
    """Write the files of a run whose texts from data are all `text`; return its folder."""
    c = toy.config("rotation" if rotated else "captioner", **fields)
    c.evals = ConfigDict({"val": evals.defaults("loss"), "samples": evals.defaults("captions")})
    c.data.name = text
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(configs.to_json(c))
    metrics = "".join(json.dumps(line) + "\n" for line in lines())
    (folder / "metrics.jsonl").write_text(metrics)
    broken = {"step": 1, "dataset": text, "index": 3, "id": text, "reason": text}
    (folder / "broken.jsonl").write_text(json.dumps(broken) + "\n")
    result = folder / "evals" / "val" / "300.json"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps({"step": 300, "protocol": text}))
    for step in (100, 300):
        path = folder / "evals" / "samples" / f"{step}.json"
        path.parent.mkdir(exist_ok=True)
        samples = [{"id": f"0 {text}", "caption": f"{text} of step {step}"}]
        path.write_text(json.dumps({"step": step, "samples": samples}))
    rng = np.random.default_rng(0)
    shown = [
        Exhibit(
            f"{k} {text}",
            (Panel(rng.integers(0, 256, (side, side, 3), np.uint8), text, True),),
            (Line("caption", text, k % 2 == 0), Line("reference", text)),
        )
        for k in range(8)
    ]
    exhibits.write(exhibits.path(folder, "samples"), 300, shown)
    facts = {
        "parameters": {"total": 700_352, "encoder": 378_816},
        "flops_per_example": {"training": 1e7},
        "devices": {"kind": text, "count": 2, "processes": 1},
        "mesh": {"data": 2},
        "schedule": {"total": 300},
        "batches": [[0, 8], [100, 16]],
        "epoch": 1000,
        "data": [{"name": text, "split": "train", "examples": 1000, "weight": 1.0}],
        "starts": [{"seconds": 1800.0, "devices": 2}, {"seconds": 1800.0, "devices": 2}],
        "commit": text,
    }
    (folder / "report" / "facts.json").write_text(json.dumps(facts))
    return folder


class Page(HTMLParser):
    """The elements, texts and data of a page; every element must be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.data = "", None
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag not in ("img", "br", "meta", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            if dict(self.tags[-1][1]).get("type") == "application/json":
                self.data = json.loads(data)
            return
        self.text += data
        if {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data

    def count(self, tag: str) -> int:
        """Return how often an element occurs."""
        return sum(name == tag for name, _ in self.tags)

    def rows(self) -> dict[str, list[str]]:
        """Return the rows of all tables by their first cell, the first row of each."""
        found: dict[str, list[str]] = {}
        for row in self._rows:
            found.setdefault(row[0], row[1:])
        return found
