"""Tests of copies between buckets and local files."""

import pytest

from cap_pretrain import files
from cap_pretrain.errors import UserError

EXPORT = "gs://bucket/exports/a"


@pytest.fixture
def folder(tmp_path):
    """Return a local folder like an exported encoder."""
    for name in ("config.json", "README.md", "model.safetensors", "siglip/config.json"):
        files.write_text(tmp_path / "export" / name, name)
    files.write_text(tmp_path / "export/siglip/model.safetensors", "x" * 6_000_000)  # in two parts
    return tmp_path / "export"


def test_a_folder_is_uploaded_with_its_config_last_and_copied_back(bucket, folder):
    files.upload(folder, files.place(EXPORT), ("config.json",))
    written = [r.name.removeprefix("bucket/exports/a/") for r in bucket.requests("write")]
    assert list(dict.fromkeys(written)) == [
        *("siglip/model.safetensors", "README.md", "model.safetensors"),
        *("siglip/config.json", "config.json"),
    ]
    with files.local(files.place(EXPORT)) as copy:
        own = sorted(path.name for path in copy.iterdir())
        assert own == ["README.md", "config.json", "model.safetensors"]
        assert (copy.name, (copy / "README.md").read_text()) == ("a", "README.md")
    assert not copy.exists()
    with files.local(files.place(f"{EXPORT}/siglip/model.safetensors")) as copy:
        assert copy.stat().st_size == 6_000_000
    with files.local(folder) as copy:
        assert copy == folder


def test_errors_name_the_place_in_the_bucket(bucket):
    path = files.place(f"{EXPORT}/config.json")
    path.write_bytes(b"[")
    with (
        pytest.raises(UserError, match=f"^{EXPORT}/config.json: is not JSON"),
        files.local(path.parent) as copy,
    ):
        files.read_json(copy / "config.json")
    with (
        pytest.raises(UserError, match="^gs://bucket/none: cannot be read"),
        files.local(files.place("gs://bucket/none")),
    ):
        pass


def test_a_failed_upload_leaves_nothing(bucket, folder):
    bucket.fail("write", "*/exports/a/config.json", 403, 9)
    with pytest.raises(OSError, match="exports/a/config.json"):
        files.upload(folder, files.place(EXPORT), ("config.json",))
    assert bucket.names() == []
