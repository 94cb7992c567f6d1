"""The report says what the files of a run say, escapes what comes from data, and stays small."""

import json
import math
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from absl import logging
from ml_collections import ConfigDict

from cap_pretrain import evals, reports
from cap_pretrain.commands import report as command
from cap_pretrain.errors import UserError
from cap_pretrain.evals import exhibits
from cap_pretrain.evals.exhibits import Exhibit, Panel
from cap_pretrain.reports import deltas, journal, sections, series, server, workdir
from tests import toy
from tests.reports import made


def test_figures_of_the_page_are_those_of_the_files(tmp_path):
    folder = made.workdir(tmp_path / "run")
    page = made.Page(reports.render(folder))
    lines = made.lines()
    last = {name: (line[name], line["step"]) for line in lines for name in line if name != "step"}
    finals = page.data["runs"][0]["finals"]
    for name in ("train/loss", "val/loss", "val/token_accuracy", "time/step_ms"):
        assert (finals[name]["value"], finals[name]["step"]) == last[name]
        assert page.rows()[name][:2] == [series.figure(last[name][0]), str(last[name][1])]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    best = min(losses, key=losses.get)
    assert (finals["train/loss"]["best"], finals["train/loss"]["best_step"]) == (losses[best], best)
    curves = {s["metric"]: s for chart in page.data["charts"] for s in chart["series"]}
    assert dict(zip(curves["train/loss"]["x"], curves["train/loss"]["y"], strict=True)) == (
        pytest.approx(losses, rel=1e-5)
    )
    assert curves["val/loss"]["x"] == [100, 200, 300]
    assert "a red square of step 100" in page.text, "an earlier caption"
    (mark,) = page.data["charts"][0]["marks"]
    assert (mark["x"], mark["y"]) == (150, 9.0)
    rows = page.rows()
    assert rows["examples"] == ["4,000"], "100 steps of 8 and 200 of 16"
    assert rows["device-hours"] == ["2"] and rows["wall time"] == ["60 min"]
    assert rows["training FLOPs"] == ["4e+10"] and rows["epochs"] == ["4"]
    assert "700,352" in page.text and "finished at step 300 of 300" in page.text


def test_a_config_is_its_differences_from_the_default():
    c = toy.config("rotation", optim__lr=0.5)
    c.evals = ConfigDict({"near": evals.defaults("knn", k=3, when="end")})
    found = deltas.from_default(c.to_dict())
    assert found["optim.lr"] == (0.5, 1e-3)
    assert found["learner.name"] == ("rotation", "captioner") and "learner.copies" not in found
    assert found["evals.near.k"] == (3, 20) and "evals.near.temperature" not in found


def test_runs_are_compared(tmp_path):
    runs = [made.workdir(tmp_path / str(k) / "run", optim__lr=lr) for k, lr in enumerate((1, 2))]
    page = made.Page(reports.render(runs))
    assert [run["name"] for run in page.data["runs"]] == ["0/run", "1/run"]
    assert page.rows()["optim.lr"] == ["1.0", "2.0"]
    loss = page.data["charts"][0]["series"]
    assert {(s["run"], s["color"], s["metric"]) for s in loss} >= {
        (0, 0, "train/loss"),
        (1, 1, "train/loss"),
    }
    assert page.count("article") == 8, "the examples of both runs stand in the same cards"


def test_different_learners_differ_in_what_was_set_and_their_losses_are_not_ranked(tmp_path):
    runs = [made.workdir(tmp_path / "cap"), made.workdir(tmp_path / "turns", rotated=True)]
    page = made.Page(reports.render(runs))
    assert page.rows()["learner.name"] == ["captioner", "rotation"]
    assert "learner.copies" not in page.rows(), "at its default, and a captioner has none"
    assert not any(attributes.get("class") == "best" for _, attributes in page.tags)
    assert {"val/token_accuracy"} == {name for name in page.rows() if name.endswith("accuracy")}


def test_what_comes_from_data_is_only_text(tmp_path):
    text = made.HOSTILE
    folder = made.workdir(tmp_path / "run", text)
    name = '"><script>alert(2)<!--'
    line = {"step": 300, f"val/{name}": 1.0}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps(line | {"step": 400}) + "\n")
    written = reports.render(folder)
    written.encode()
    page = made.Page(written)
    assert page.count("script") == 2 and page.count("img") == 8
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes), tag
        assert attributes.get("src", "data:image/").startswith("data:image/")
    assert page.text.count("<script>alert(1)</script>") > 20 and "\x07" not in page.text
    assert f"val/{name}" in page.data["runs"][0]["finals"]


def test_the_page_loads_nothing_and_runs_one_script(tmp_path):
    page = reports.render(made.workdir(tmp_path / "run"))
    policy = next(a["content"] for _, a in made.Page(page).tags if "http-equiv" in a)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "") and "https:" not in page


def test_damaged_files_leave_the_rest(tmp_path):
    folder = made.workdir(tmp_path / "run")
    for name in ("report/facts.json", "evals/val/300.json", "broken.jsonl"):
        (folder / name).write_text('{"half')
    exhibits.path(folder, "samples").write_text('{"step": 1, "exhibits": [{"title": 3}]}')
    page = made.Page(reports.render(folder))
    assert page.data["runs"][0]["finals"]["train/loss"]["step"] == 300
    for name in ("facts.json", "300.json", "broken.jsonl", "samples.shown.json"):
        assert name in page.text
    (folder / "config.json").write_text("[]")
    (folder / "metrics.jsonl").write_text("")
    made.Page(reports.render(folder))


@pytest.mark.parametrize(
    "facts",
    [
        '{"data": 3, "starts": [1], "devices": [], "epoch": "x"}',
        '{"batches": [["a"]], "parameters": {"total": null}}',
        f'{{"starts": [{{"seconds": 1{"0" * 400}, "devices": NaN}}], "batches": [[0, Infinity]]}}',
        "[]",
    ],
)
def test_facts_of_other_types_are_left_out(facts, tmp_path):
    folder = made.workdir(tmp_path / "run")
    (folder / "report" / "facts.json").write_text(facts)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 301, "train/loss": NaN, "spike/loss": 1{"0" * 400}}}\n')
    made.Page(reports.render(folder))


def test_a_long_run_with_large_images_makes_a_small_page(tmp_path, monkeypatch):
    monkeypatch.setattr(series, "ALL_POINTS", 3000)
    monkeypatch.setattr(sections, "IMAGE_BYTES", 400_000)
    runs = [made.workdir(tmp_path / str(k), side=300) for k in range(2)]
    for run in runs:
        rows = [{"step": k} | {f"train/m{m}": k * 1.1 for m in range(12)} for k in range(500)]
        with (run / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    page = reports.render(runs)
    assert 3e5 < len(page) < 8e5
    charts = made.Page(page).data["charts"]
    assert sum(len(s["x"]) for chart in charts for s in chart["series"]) <= 3000


def test_thinning_keeps_extremes_and_gaps():
    values = [math.sin(k / 50) for k in range(5000)]
    values[1234], values[4321], values[77] = 9.0, -9.0, None
    steps, thin = series.thinned((list(range(5000)), values), 100)
    assert len(steps) <= 100 and (steps[0], steps[-1]) == (0, 4999)
    assert {9.0, -9.0} <= set(thin) and all(
        values[k] == v for k, v in zip(steps, thin, strict=True)
    )
    assert series.thinned(([1, 2], [None, None]), 100) == ([1, 2], [None, None])


def test_examples_are_stored_within_bounds(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 600, 3), np.uint8)
    path = tmp_path / "a.shown.json"
    exhibits.write(path, 7, [Exhibit(str(k), (Panel(noise),) * 4) for k in range(30)])
    found = exhibits.read(path)
    size = sum(len(panel["data"]) for e in found["exhibits"] for panel in e["panels"])
    assert found["step"] == 7 and 0 < size <= exhibits.BYTES
    panel = found["exhibits"][0]["panels"][0]
    assert (panel["width"], panel["height"]) == (213, 320) and panel["type"] == "image/jpeg"


def test_a_path_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="is not the workdir of a run"):
        reports.render(tmp_path)
    assert command.main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    assert command.main([str(tmp_path)]) == 2 and "--serve" in capsys.readouterr().err


def test_the_command_writes_the_page_of_a_checkpoint_s_run(tmp_path):
    folder, out = made.workdir(tmp_path / "run"), tmp_path / "page.html"
    assert command.main([str(folder / "checkpoints" / "300"), "--out", str(out)]) == 0
    assert made.Page(out.read_text()).data["runs"][0]["name"] == "run"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_run_writes_a_page_now_and_then_and_at_its_end(tmp_path):
    folder, clock = made.workdir(tmp_path / "run"), Clock()
    (folder / "report" / "facts.json").unlink()
    page, facts = folder / reports.FILE, folder / "report" / "facts.json"
    for start in range(2):
        own = journal.Journal(folder, lambda: {"epoch": 5}, enabled=True, clock=clock)
        own.write(1)
        page.unlink()
        clock.now += journal.PERIOD / 2
        own.write(2)
        assert not page.exists(), "too soon"
        own.write(3, last=True)
        assert page.exists() and len(json.loads(facts.read_text())["starts"]) == start + 1
    content = json.loads(facts.read_text())
    assert content["epoch"] == 5 and [s["seconds"] for s in content["starts"]] == [15.0, 15.0]
    off = journal.Journal(tmp_path / "none", dict, enabled=False)
    off.write(1, last=True)
    assert not (tmp_path / "none").exists()


def test_a_page_that_cannot_be_made_only_warns(tmp_path, monkeypatch):
    folder, warned = made.workdir(tmp_path / "run"), []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warned.append(text % args))
    monkeypatch.setattr(sections, "finals", lambda runs: 1 / 0)
    journal.Journal(folder, dict, enabled=True).write(1)
    assert len(warned) == 1 and "division by zero" in warned[0]


def test_the_server_gives_this_page_to_this_machine_only(tmp_path):
    folder = made.workdir(tmp_path / "run")
    serving = server.server(lambda: reports.render(folder, live=5), 0)
    assert serving.server_address[0] == "127.0.0.1"
    url = f"http://127.0.0.1:{serving.server_address[1]}"
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    try:
        first = made.Page(urllib.request.urlopen(url).read().decode()).data
        assert first["live"] == 5
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 400, "train/loss": 1.0}\n')
        second = made.Page(urllib.request.urlopen(url).read().decode()).data
        assert second["version"] != first["version"]
        evil = "localhost.evil.example:80"
        asked = [("/config.json", "localhost:9000", 404), ("/../", "127.0.0.1", 404)]
        for path, host, code in [*asked, ("/none", "[::1]:80", 404), ("/", evil, 403)]:
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(urllib.request.Request(url + path, headers={"Host": host}))
            assert error.value.code == code, host
    finally:
        serving.shutdown()
        serving.server_close()


def test_builds_are_those_where_the_run_was(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "report.json").write_text('{"train": {"kept": 7}}')
    (tmp_path / "report.json").write_text('{"train": {"kept": 8}}')
    monkeypatch.chdir(tmp_path)
    folder = made.workdir(tmp_path / "run", text="")
    assert not workdir.read(folder, "run").builds
    place = folder / "report" / "facts.json"
    facts = json.loads(place.read_text())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    place.write_text(json.dumps(facts | {"folders": {"data": str(tmp_path / "data")}}))
    assert workdir.read(folder, "run").builds == {"data": {"train": {"kept": 7}}}


def test_names_of_runs_differ(tmp_path):
    folders = [tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "c" / "y"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert [run.name for run in workdir.read_all(folders)] == ["a/x", "b/x", "c/y"]
