import contextlib
import errno
import time

import pytest

from cap_pretrain import files
from cap_pretrain.errors import UserError, disk_error
from cap_pretrain.files import buckets, logs

RUN = "gs://bucket/runs/a"


def test_paths_in_a_bucket_behave_like_those_of_folders(bucket, tmp_path):
    seen = []
    for run in (files.place(RUN), files.place(tmp_path / "a")):
        run.mkdir(parents=True, exist_ok=True)
        files.write_text(run / "config.json", '{"a": 1}')
        files.write_bytes(run / "evals" / "val" / "3.json", b"[]")
        files.write_bytes(run / "evals" / "val" / "20.json", b"[1]")
        files.write_bytes(run / "evals" / "table.csv", b"")
        text = run / "text.txt"
        with text.open("w", encoding="utf-8") as file:
            file.write("é")
        text.rename(run / "renamed.txt")
        (run / "gone").write_bytes(b"x")
        (run / "gone").unlink()
        (run / "gone").unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError, match="gone"):
            (run / "gone").unlink()
        with pytest.raises(FileNotFoundError, match="gone"):
            (run / "gone").read_bytes()
        with pytest.raises(FileExistsError):
            (run / "evals").mkdir()
        with (run / "renamed.txt").open(encoding="utf-8") as file:
            assert file.read() == (run / "renamed.txt").read_text(encoding="utf-8") == "é"
        found = [
            sorted(p.relative_to(run).as_posix() for p in run.glob(pattern))
            for pattern in ("*", "evals/*/*.json", "evals/*", "config.json", "none", "none/*")
        ]
        found += [
            [p.exists(), p.is_dir(), p.is_file()]
            for p in (run, run / "evals", run / "config.json", run / "none", run / "eval")
        ]
        found += [sorted(files.numbered(run / "evals" / "val", ".json")), files.numbered(text)]
        found += [files.read_json(run / "config.json"), files.total_size(run)]
        found += [(run / "config.json").stat().st_size, files.unused(run / "config.json").name]
        with pytest.raises(UserError, match="no such file"):
            files.read_json(run / "none.json")
        seen.append(found)
    sizes = [found.pop(-3) for found in seen]  # folders of a disk have sizes, too
    assert seen[0] == seen[1] and sizes[0] == 8 + 2 + 2 + 3
    assert bucket.names("bucket/runs/a/") == [
        *("config.json", "evals/table.csv", "evals/val/20.json", "evals/val/3.json"),
        "renamed.txt",
    ]
    run = files.place(RUN)
    assert abs(run.joinpath("config.json").stat().st_mtime - time.time()) < 5
    assert run.absolute() == run.resolve() == run.expanduser() == run


def test_lists_come_in_pages_and_trees_go_completed_checkpoints_first(bucket):
    bucket.page = 3
    run = files.place(RUN)
    for number in range(8):
        (run / f"{number}" / "commit_success.txt").write_text("")
        (run / f"{number}" / "d" / "data").write_bytes(b"12")
    (run / "10" / "data").write_bytes(b"")  # not below 1
    assert sorted(files.numbered(run)) == [*range(8), 10]
    assert files.total_size(run / "1") == 2 and len(list(run.rglob("*"))) == 17
    bucket.fail("delete", "*/data", status=403)
    with pytest.raises(PermissionError):
        (run / "1").rmtree()
    assert bucket.names("bucket/runs/a/1/") == ["d/data"]
    bucket.heal()
    (run / "1").rmtree()
    (run / "1").rmtree(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (run / "1").rmtree()
    assert sorted(files.numbered(run)) == [0, *range(2, 8), 10]


def test_a_write_holds_a_condition(bucket):
    path = files.place(f"{RUN}/lock")
    first = buckets.put(path, b"1", 0)
    with pytest.raises(FileExistsError):
        buckets.put(path, b"2", 0)
    version = buckets.get(path)
    assert (version.data, version.generation) == (b"1", first) and 0 <= version.age < 3
    second = buckets.put(path, b"2", first)
    assert second > first
    for act in (lambda: buckets.put(path, b"3", first), lambda: buckets.remove(path, first)):
        with pytest.raises(FileExistsError):
            act()
    buckets.remove(path, second)
    with pytest.raises(FileNotFoundError):
        buckets.get(path)
    for mode in ("w", "wb"):
        with contextlib.suppress(RuntimeError), path.open(mode) as file:
            file.write("part" if mode == "w" else b"part")
            raise RuntimeError
    assert not bucket.objects
    with pytest.raises(ValueError, match="cannot be opened in mode 'ab'"):
        path.open("ab")  # it would replace what is there


@pytest.mark.slow
def test_errors_name_the_url_and_passing_ones_are_repeated(bucket):
    path = files.place(f"{RUN}/a")
    bucket.fail("write", "*", times=1)
    path.write_bytes(b"1")
    assert [r.status for r in bucket.requests("write")] == [503, 200]
    bucket.fail("*", "*", status=403)
    with pytest.raises(PermissionError, match="gs://bucket/runs/a/a") as raised:
        path.write_bytes(b"1")
    assert disk_error(raised.value) == "Permission denied"
    with pytest.raises(UserError, match=f"--workdir: cannot write to '{RUN}' .Permission denied."):
        files.make_workdir(files.place(RUN))
    with pytest.raises(UserError, match="cannot be read .*Permission denied"):
        files.read_json(path)
    bucket.heal()
    with pytest.raises(
        UserError, match="cannot write to 'gs://missing/run' .the bucket does not exist"
    ):
        files.make_workdir(files.place("gs://missing/run"))
    files.make_workdir(files.place(RUN))
    assert bucket.names() == ["bucket/runs/a/a"]


def test_a_log_is_uploaded_from_time_to_time_and_continued(bucket, monkeypatch):
    monkeypatch.setattr(logs, "PERIOD", 0.05)
    path = files.place(f"{RUN}/metrics.jsonl")
    name = "bucket/runs/a/metrics.jsonl"
    path.write_bytes(b"earlier\n")
    log = files.Appended(path)
    for number in range(30):
        log.write(f"{number}\n".encode())
    deadline = time.monotonic() + 5
    while bucket.objects[name].data[-3:] != b"29\n" and time.monotonic() < deadline:
        time.sleep(0.01)
    lines = bucket.objects[name].data.split()
    assert lines == [b"earlier", *(str(n).encode() for n in range(30))]
    assert len(bucket.requests("write", name)) < 10
    time.sleep(0.2)
    quiet = len(bucket.requests("write", name))
    monkeypatch.setattr(logs, "PERIOD", 60)
    log.write(b"30\n")
    log.flush()
    assert bucket.objects[name].data.endswith(b"29\n30\n")
    log.write(b"31\n")
    log.close()
    assert bucket.objects[name].data.endswith(b"30\n31\n")
    assert len(bucket.requests("write", name)) == quiet + 2
    bucket.fail("write", name, status=403)
    log = files.Appended(path)
    log.write(b"x")
    with pytest.raises(OSError, match="metrics.jsonl") as raised:
        log.flush()
    assert raised.value.errno == errno.EACCES
    with pytest.raises(OSError, match="metrics.jsonl"):
        log.close()
