import os
import subprocess
import sys
from pathlib import Path

import pytest

from cap_pretrain import files
from cap_pretrain.errors import UserError


def test_paths_are_local_and_urls_are_in_buckets():
    for text in ("runs/a", "/data/runs/a", "a:/b", Path("runs/a")):
        assert type(files.place(text)) is type(Path()) and files.place(text) == Path(text)
        assert not files.is_url(files.place(text))
    for text in ("gs://bucket/runs/a", "gs://bucket/runs/a/", "gs://bucket//runs/a"):
        path = files.place(text)
        assert str(path) == os.fspath(path) == "gs://bucket/runs/a" and files.is_url(path)
        assert (path.name, str(path.parent)) == ("a", "gs://bucket/runs")
        assert str(path / "checkpoints" / "3") == "gs://bucket/runs/a/checkpoints/3"
        assert files.place(path) == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://bucket/run", "s3://bucket/run: a run cannot be there: Orbax, .* has no S3"),
        ("az://bucket/run", "az://bucket/run: a run cannot be there: .*; give a folder or gs://"),
        ("gcs://bucket/run", "begins with gs://"),
        ("gs://bucket", "names no folder"),
        ("gs:///run", "names no folder"),
        ("gs://", "names no folder"),
        ("gs://bucket/run[1]", "contains '.'"),
        ("gs://bucket/runs/../a", "contains '..'; give"),
        ("gs://bucket/a/..", "contains '..'; give"),
        (Path("gs://bucket/run"), "gs:/bucket/run: .* write gs://bucket/run"),
    ],
)
def test_other_urls_are_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as refused:
        files.place(text)
    assert "\n" not in str(refused.value)


def test_local_paths_need_no_package_of_buckets():
    code = (
        "import sys; sys.modules.update(gcsfs=None, etils=None, fsspec=None)\n"
        "from cap_pretrain import files\n"
        "print(files.place('runs/a'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "runs/a\n", done.stderr
