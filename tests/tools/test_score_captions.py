"""Tests of tools/score_captions.py: its output, and its messages for invalid files."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cap_pretrain.commands import score_captions
from tests.evals.test_caption_metrics import CAPTIONS, PUBLISHED, REFERENCES

NUMBERS = {"a": 7, "b": 1_000_000_000_001}


@pytest.fixture(autouse=True)
def no_java(monkeypatch, request):
    if "with_java" not in request.fixturenames:
        monkeypatch.setenv("PATH", "/nowhere")


@pytest.fixture
def with_java():
    if not shutil.which("java"):
        pytest.skip("there is no Java here")


@pytest.fixture
def write(tmp_path):
    """Return a function that writes JSON, gzipped for names in .gz, and returns the path."""

    def write(name, content):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def annotations(references=REFERENCES):
    entries = [(NUMBERS[i], caption) for i, texts in references.items() for caption in texts]
    return {
        "images": [],
        "annotations": [
            {"id": k, "image_id": i, "caption": caption} for k, (i, caption) in enumerate(entries)
        ],
    }


def results(captions=CAPTIONS):
    return [{"image_id": NUMBERS[i], "caption": caption} for i, caption in captions.items()]


def tokenized(captions=CAPTIONS, references=REFERENCES):
    return {
        "gts": {str(NUMBERS[i]): texts for i, texts in references.items()},
        "res": {str(NUMBERS[i]): [caption] for i, caption in captions.items()},
    }


def run(*arguments, capsys):
    """Return the exit status and the lines of stdout and stderr."""
    code = score_captions.main([str(a) for a in arguments])
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err.splitlines()


def assert_published(metrics, but=()):
    expected = {name: value for name, value in PUBLISHED.items() if name not in but}
    found = {name: value for name, value in metrics.items() if name in (*PUBLISHED, "SPICE")}
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("end", ["json", "json.gz"])
def test_the_table_and_one_line_of_json(write, capsys, end):
    files = (
        *("--annotations", write(f"a.{end}", annotations())),
        *("--results", write(f"r.{end}", results())),
    )
    code, lines, _ = run(*files, capsys=capsys)
    assert code == 0
    assert lines[0] == "2 images, 4 references; tokenizer: Python (not PTB)"
    assert "Bleu_4    0.20114" in lines and "CIDEr     1.24219" in lines
    assert "METEOR    skipped: there is no java on the PATH" in lines
    last = json.loads(lines[-1])
    assert_published(last, but=("METEOR",))
    assert (last["images"], last["references"]) == (2, 4)
    assert last["tokenizer"] == "Python (not PTB)"
    assert last["skipped"].keys() == {"PTB", "METEOR", "SPICE"}


@pytest.mark.slow
def test_as_a_program_with_java(with_java, write):
    captions = {i: caption.title() + " ." for i, caption in CAPTIONS.items()}
    command = [sys.executable, score_captions.__file__]
    command += ["--annotations", write("a.json", annotations())]
    command += ["--results", write("r.json", results(captions)), "--spice", "no"]
    root = Path(score_captions.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    printed = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    last = json.loads(printed.stdout.splitlines()[-1])
    assert_published(last)
    assert last["tokenizer"] == "PTB" and last["skipped"] == {"SPICE": "not asked for"}
    assert printed.stderr == ""


def test_tokenized_text_needs_nothing_else(write, capsys):
    path = write("t.json.gz", tokenized())
    code, lines, _ = run("--tokenized", path, capsys=capsys)
    last = json.loads(lines[-1])
    assert code == 0
    assert_published(last, but=("METEOR",))
    assert last["tokenizer"] == "none (text as given)"
    assert last["skipped"].keys() == {"METEOR", "SPICE"}
    assert "python_tokenizer_agreement" not in last


def test_tokenized_text_is_compared_with_the_python_tokenizers(write, capsys):
    captions = CAPTIONS | {"a": CAPTIONS["a"].replace("sentence1", "sentence-1")}
    files = (
        *("--annotations", write("a.json", annotations())),
        *("--results", write("r.json", results({i: c.upper() + "!" for i, c in captions.items()}))),
        *("--tokenized", write("t.json", tokenized())),
    )
    code, lines, _ = run(*files, capsys=capsys)
    last = json.loads(lines[-1])
    assert code == 0 and last["python_tokenizer_agreement"] == 5 / 6
    assert_published(last, but=("METEOR",))  # the tokenized text is scored


def test_results_of_the_evaluator_are_scored(write, capsys):
    entries = [
        {"image_id": f"image {i}", "caption": CAPTIONS[i], "references": REFERENCES[i]}
        for i in CAPTIONS
    ]
    path = write("5000.json", {"step": 5000, "CIDEr": 9.0, "captions": entries})
    code, lines, _ = run("--results", path, capsys=capsys)
    assert code == 0
    assert_published(json.loads(lines[-1]), but=("METEOR",))


def test_scores_of_each_image(write, tmp_path, capsys):
    files = ("--annotations", write("a.json", annotations()), "--results", write("r", results()))
    out = tmp_path / "per_image.json"
    assert run(*files, "--per_image", out, capsys=capsys)[0] == 0
    rows = json.loads(out.read_text())
    assert [row["image_id"] for row in rows] == [str(NUMBERS["a"]), str(NUMBERS["b"])]
    assert sum(row["CIDEr"] for row in rows) / 2 == pytest.approx(PUBLISHED["CIDEr"], abs=1e-6)


def test_a_subset_is_scored_only_if_asked(write, capsys):
    files = (
        *("--annotations", write("a.json", annotations())),
        *("--results", write("r.json", results({"b": CAPTIONS["b"]}))),
    )
    code, _, errors = run(*files, capsys=capsys)
    assert code == 2 and len(errors) == 1
    assert "r.json: no caption for image 7 of " in errors[0] and "--subset" in errors[0]
    code, lines, _ = run(*files, "--subset", capsys=capsys)
    assert code == 0 and json.loads(lines[-1])["images"] == 1


MISTAKES = {  # annotations, results, message
    "no references": (annotations({"a": ["x"]}), results(), "a.json: no references for image 100"),
    "duplicate": (annotations(), results() + results(), "image 7 has more than one caption"),
    "no list": ({"images": []}, results(), "a.json: has no list of annotations (found: images)"),
    "no entries": (annotations(), [], "r.json: has no list of captions (found: [])"),
    "another layout": (
        annotations(),
        {"7": "a dog"},
        "r.json: has no list of captions (found: 7",
    ),
    "no caption": (annotations(), [{"image_id": 7}], "{'image_id': 7} has no image_id and caption"),
    "no entry": (annotations(), ["a dog"], "r.json: 'a dog' has no image_id and caption"),
    "no text": (
        annotations(),
        [{"image_id": 7, "caption": None}],
        "the caption None is not text",
    ),
    "no JSON": (b'[{"image_id": 7', results(), "a.json: is not JSON"),
    "no UTF-8": (annotations(), b'["\xff\xfe"]', "r.json: is not JSON"),
    "half a gzip": (gzip.compress(b"[" * 999)[:20], results(), "a.json: cannot be read"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_error_messages_have_one_line(write, capsys, case):
    given, found, message = MISTAKES[case]
    files = ("--annotations", write("a.json", given), "--results", write("r.json", found))
    code, lines, errors = run(*files, capsys=capsys)
    assert (code, lines, len(errors)) == (2, [], 1)
    assert errors[0].startswith("error: ") and message in errors[0]


def test_mistakes_of_the_command_line(write, tmp_path, capsys):
    r = write("r.json", results())
    other = write("t.json", tokenized({"a": "x"}, {"a": ["x"]}))
    two = write("two.json", {"gts": {"7": ["x"]}, "res": {"7": ["x", "y"]}})
    a = write("a.json", annotations())
    for arguments, message in (
        ([], "--results: is missing; name the captions"),
        (["--annotations", r], "--results: is missing; name the captions"),
        (["--results", r], "has no references; add --annotations"),
        (["--results", tmp_path / "none.json"], "none.json: no such file"),
        (["--results", tmp_path], "cannot be read"),
        (["--tokenized", r], "'gts' and 'res' must hold texts by image"),
        (["--tokenized", two], "image 7 has 2 captions in 'res', not one"),
        (
            ["--annotations", a, "--results", r, "--tokenized", other],
            "its images or captions differ from",
        ),
    ):
        code, _, errors = run(*arguments, capsys=capsys)
        assert (code, len(errors)) == (2, 1), arguments
        assert message in errors[0]
    with pytest.raises(SystemExit) as left:
        run("--results", r, "--spice", "please", capsys=capsys)
    assert left.value.code == 2


def test_numbers_and_texts_that_name_the_same_image_match(write, capsys):
    given = annotations()
    for n, entry in enumerate(given["annotations"]):
        kinds = (float, str, int)
        entry["image_id"] = kinds[n % 3](entry["image_id"])
    found = [{**entry, "image_id": float(entry["image_id"])} for entry in results()]
    files = ["--annotations", str(write("a.json", given)), "--results", str(write("r.json", found))]
    assert score_captions.main(files) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 2


def test_one_image_is_scored_without_cider_and_told(write, capsys):
    entry = {"image_id": 1, "caption": "a dog", "references": ["a dog \ud800 runs"]}
    assert score_captions.main(["--results", str(write("r.json", [entry]))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "CIDEr     skipped: always 0 for a single image" in lines
    assert json.loads(lines[-1])["mended"] == 1 and "1 texts were mended" in lines[-2]
