"""Tests that names and captions from data are shown as they are, on one line, by all tools."""

import argparse
import itertools
import json
import random
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from cap_pretrain.cli import arguments, figures
from cap_pretrain.commands import plot_embeddings
from cap_pretrain.data.builders import hashes
from cap_pretrain.errors import UserError
from cap_pretrain.telemetry import tables
from cap_pretrain.untrusted import printable
from tests.tools.launchers import ROOT

HOSTILE = [
    *(r"file$\frac$.jpg", "$x$", r"\$5 and $6", "_hidden", "a\nid b", "a\r\nb", "tab\t", "\x1b[2J"),
    *("\ud83d half", "\udce9 of Latin-1", "a\u2028b", "\x00", "\uffff", "\x85", "é \U0001f600 ‍x"),
    *("<b>&amp;</b>", "", " ", '"quoted"', '"', "a | b", "%s {x} \\n"),
]
PIECES = [*HOSTILE, "$", "\\", "_", "^", "{", "}", "a", "\n", '"', "|"]


def generated(count):
    """Return texts of random pieces."""
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randint(1, 5))) for _ in range(count)]


def words_in(svg):
    """Return the texts of an SVG file; raises an exception if it is not XML."""
    tree = ET.parse(svg)
    return [text.text or "" for text in tree.iter("{http://www.w3.org/2000/svg}text")]


def figure_of(texts):
    """Return a figure with the texts as titles, annotations and names of axes and of a legend."""
    figure = figures.new_figure(4, 4)
    axis = figure.subplots()
    for put, text in zip(
        itertools.cycle(("title", "x", "annotate", "legend")), texts, strict=False
    ):
        if put == "title":
            figure.text(0, 0, text)
        elif put == "x":
            axis.set_title(text)
        elif put == "annotate":
            axis.annotate(text, (0.5, 0.5), xycoords="axes fraction")
        else:
            figure.legend([axis.scatter([1], [1])], [text])
    return figure


def drawn_as_they_are(texts, out):
    figures.save(figure_of(texts), out)
    shown = [word.replace("\xa0", " ").split() for word in words_in(out)]
    return [text for text in texts if printable(text).split() not in shown and printable(text)]


@pytest.mark.parametrize("start", range(0, len(HOSTILE), 8))
def test_figures_show_texts_as_they_are(start, tmp_path):
    texts = HOSTILE[start : start + 8]
    for text in texts:
        assert drawn_as_they_are([text], tmp_path / "out.svg") == []
    figures.save(figure_of(texts), tmp_path / "out.png")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Glyph")
def test_figures_show_generated_texts_as_they_are(tmp_path):
    texts = generated(400)
    for start in range(0, len(texts), 4):
        assert drawn_as_they_are(texts[start : start + 4], tmp_path / "out.svg") == []


def test_numbers_at_axes_stay_formulas(tmp_path):
    figure = figures.new_figure(4, 4)
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.set_xlim(1, 1e6)
    figures.save(figure, tmp_path / "out.svg")
    assert "mathdefault" not in "".join(words_in(tmp_path / "out.svg"))


def test_classes_are_in_the_legend_whatever_their_names(tmp_path):
    import numpy as np

    names = ["_private", r"$\frac$", "_private", "plain"]
    points = plot_embeddings.Points(np.zeros((8, 2)), np.arange(8) % 4, np.zeros((8, 4, 4, 3)))
    xy = np.random.default_rng(0).standard_normal((8, 2))
    figures.save(plot_embeddings.draw(points, xy, names, False), tmp_path / "out.svg")
    assert words_in(tmp_path / "out.svg")[-4:] == names


def test_printable_texts_are_one_line_and_stay_json():
    for text in (*HOSTILE, *generated(2000)):
        shown = printable(text)
        assert len(shown.splitlines()) <= 1
        shown.encode()
        assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text
    good = "naïve café, 日本語\u3000\xa0 \U0001f468‍\U0001f469"
    assert printable(good) == good
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\u001b"


def test_tools_print_names_that_are_not_utf_8():
    script = (
        "import argparse; from cap_pretrain.cli import arguments\n"
        "arguments.run(lambda args: print('wrote M\\udce4rz.png'), argparse.Namespace())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, cwd=ROOT, env={"PYTHONUTF8": "1"}
    )
    assert done.stdout == b"wrote M\\udce4rz.png\n" and done.returncode == 0


def test_messages_have_no_control_characters(capsys):
    def fail(_):
        raise UserError("a\x1b[2J.jpg: broken.\nRemove it.")

    assert arguments.run(fail, argparse.Namespace()) == 2
    assert capsys.readouterr().err == "error: a\\u001b[2J.jpg: broken.\nRemove it.\n"


def test_cells_of_markdown_stay_cells():
    assert tables.markdown(["a|b"], [["c\nd"]]).splitlines()[-1] == r"| c\nd |"
    assert tables.markdown(["a|b"], []).startswith(r"| a\|b |")


def test_lists_of_held_out_ids_are_read_as_they_were_written(tmp_path):
    ids = list(dict.fromkeys((*HOSTILE, *generated(2000), "val/0", "\xe9t\xe9", "a\xa0")))
    path = tmp_path / "list"
    path.write_text("\n".join(map(hashes.held_out_id, ids)), encoding="utf-8")
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(ids)
    assert hashes.read_held_out([path]).ids == set(ids)
    assert hashes.held_out_id("val/0") == "id val/0"
    path.write_text("\ufeffid a b\r\nexact 00ff\r\n", encoding="utf-8")
    assert hashes.read_held_out([path]).ids == {"a b"}
    for bad in ("perceptual -1", "exact 1_0", "exact "):
        path.write_text(bad)
        with pytest.raises(UserError, match="not a hexadecimal hash|begins with"):
            hashes.read_held_out([path])
