"""Builds with Apache Beam (the extra `beam`) give the same datasets."""

import sys

import pytest

from cap_pretrain.commands.rehearse_build import contents, write_tars
from tests.data.test_build_units import numbered
from tests.data.test_question_formats import build
from tests.tools.test_build_dataset import run


def test_beam_builds_the_same(tmp_path):
    pytest.importorskip("apache_beam")
    write_tars(tmp_path / "tars", 60, per_tar=20, size=(64, 48))
    arguments = ("--shards", tmp_path / "tars", "--dedup", "perceptual")
    whole = contents(build(tmp_path, "webdataset", *arguments))
    by_beam = (*arguments, "--overwrite", "--beam=--runner=DirectRunner")
    assert contents(build(tmp_path, "webdataset", *by_beam)) == whole


def test_a_missing_beam_is_reported(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    arguments = ("--name", "mine", "--out", tmp_path / "out", *numbered(tmp_path, 3))
    assert run("csv", *arguments, "--beam=") == 2
    assert "pip install 'cap_pretrain[beam]'" in capsys.readouterr().err
