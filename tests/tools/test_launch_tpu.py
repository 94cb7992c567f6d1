"""Tests of tools/launch_tpu.sh and tools/launch_tpu_worker.sh."""

import concurrent.futures
import getpass
import json
import os
import signal
import subprocess
import time

import pytest

from tests.tools.launchers import PACKAGING, PROGRAM_FLAGS

INSTALL = ["tpu-vm scp", "unpack", "install"]
AGAIN = ["start", "follow", "ended"]
FIRST = [*INSTALL, *AGAIN]


def test_creates_the_slice_installs_and_runs(bench):
    text = 'it\'s $HOME & ("all") '
    done = bench.tpu("--spot", "--create_flag=--network=my net", f"--env=A={text}", "--env=B=")
    assert done.returncode == 0, done.stderr
    assert bench.verbs() == ["tpu-vm create", *FIRST]
    create = next(call for call in bench.calls("gcloud") if call[3] == "create")
    assert create == [
        *("compute", "tpus", "tpu-vm", "create", "pod", "--version=v2-alpha-tpuv5-lite"),
        *("--accelerator-type=v5litepod-256", "--spot", "--network=my net", "--zone=z"),
    ]
    assert "step 1" in done.stdout
    for worker in ("worker0", "worker1"):
        assert bench.calls(worker) == [["-u", "-m", "cap_pretrain.main", *PROGRAM_FLAGS]]
        for file in (*PACKAGING, "cap_pretrain/main.py"):
            assert (bench.fake / worker / "cap_pretrain" / file).is_file()
        environment = json.loads((bench.fake / worker / "environment.json").read_text())
        assert (environment["A"], environment["B"]) == (text, "")
    enable = "echo always >/sys/kernel/mm/transparent_hugepage/enabled"
    linger = ["loginctl", "enable-linger", getpass.getuser()]
    assert sorted(bench.calls("sudo")) == [linger] * 2 + [["sh", "-c", enable]] * 2


def test_a_ready_slice_is_used_and_a_running_program_is_followed(bench):
    (bench.fake / "tpu-vm").write_text("READY")
    worker = bench.fake / "worker0/cap_pretrain"
    for done in (bench.tpu("--project=p", statuses="0\n0"), bench.tpu(statuses="0\n0")):
        assert done.returncode == 0, done.stderr
    assert bench.verbs() == [*FIRST, *FIRST]
    assert all("--project=p" in call for call in bench.calls("gcloud")[:3])
    assert len(bench.calls("worker1")) == 2
    assert len(list(worker.glob("run/log*"))) == 2  # no log is overwritten

    # Ctrl-C leaves it running.
    (bench.fake / "statuses").write_text("0\n0\nwaits")
    launcher = bench.start(
        start_new_session=True,
        # Bash would inherit an ignored SIGINT if the tests run in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        text=True,
    )
    ready = [bench.fake / f"worker{i}_start_3" for i in range(2)]
    while not all(path.exists() for path in ready) or bench.verbs()[-1] != "follow":
        time.sleep(0.05)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(20) == 130
    assert "the program keeps running" in launcher.stderr.read()

    (bench.fake / "gcloud.jsonl").unlink()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        following = pool.submit(bench.tpu, statuses=None)
        while "follow" not in bench.verbs():
            time.sleep(0.05)
        stopped = bench.tpu("--stop", statuses=None, program=[])
        followed = following.result()
    assert (stopped.returncode, followed.returncode) == (0, 143)
    assert "stopped by SIGTERM" in followed.stderr
    assert sorted(bench.verbs()) == ["ended", "follow", "stop"]


@pytest.mark.parametrize(
    "after", [pytest.param("READY READY READY PREEMPTED", marks=pytest.mark.slow), "PREEMPTED"]
)
def test_a_preempted_slice_is_created_again_and_the_run_resumes(bench, after):
    (bench.fake / "tpu-vm").write_text("READY")
    bench.env["AFTER"] = after  # in the second case the workers are gone
    done = bench.tpu("--max_failures=1", statuses="preempted\n0")
    assert done.returncode == 0, done.stderr
    again = ["tpu-vm delete", "tpu-vm create", *FIRST]
    assert bench.verbs()[-len(again) :] == again
    assert len(bench.calls("worker0")) == 2


def test_a_slice_preempted_before_the_start_is_created_again(bench):
    (bench.fake / "tpu-vm").write_text("PREEMPTED")
    assert bench.tpu().returncode == 0
    assert bench.verbs() == ["tpu-vm delete", "tpu-vm create", *FIRST]


def test_a_queued_resource_is_awaited_and_requested_again(bench):
    bench.env["AFTER"] = "READY PREEMPTED"
    done = bench.tpu("--queued", "--spot", statuses="preempted\n0")
    assert done.returncode == 0, done.stderr
    ask, drop = "queued-resources create", "queued-resources delete"
    assert bench.verbs() == [ask, *FIRST, drop, ask, *FIRST]
    calls = bench.calls("gcloud")
    assert next(call for call in calls if call[3] == "create") == [
        *("compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod"),
        *("--runtime-version=v2-alpha-tpuv5-lite", "--accelerator-type=v5litepod-256", "--spot"),
        "--zone=z",
    ]
    assert next(call for call in calls if call[3] == "delete")[4:7] == ["pod", "--force", "--quiet"]


def test_a_crash_and_a_lost_host_are_restarted(bench):
    (bench.fake / "tpu-vm").write_text("READY")
    done = bench.tpu("--max_failures=4", statuses="1 75\n137 75\n0")
    assert done.returncode == 0, done.stderr
    assert bench.verbs() == [*FIRST, *AGAIN, *AGAIN]
    assert "crashed (1 75)" in done.stderr and "crashed (75 137)" in done.stderr


def test_quick_crashes_end_it(bench):
    (bench.fake / "tpu-vm").write_text("READY")
    done = bench.tpu("--max_failures=2", statuses="1\n1\n0")
    assert done.returncode == 1
    assert "crashed 2 times in a row (1)" in done.stderr
    assert bench.verbs() == [*FIRST, *AGAIN]


@pytest.mark.parametrize(
    ("lost", "code"),
    [
        ("follow " * 30, 0),
        ("state " * 10, 1),
        pytest.param("state " * 9 + "follow " + "state " * 8, 0, marks=pytest.mark.slow),
    ],
)
def test_lost_connections_are_survived_unless_none_succeeds(bench, lost, code):
    (bench.fake / "lost").write_text(lost)  # in this order; then no more
    bench.put(
        "gcloud",
        '#!/bin/bash\nread -r verb rest <"$FAKE/lost"\n'
        'lose() { [[ $verb != "$1" ]] || { echo "$rest" >"$FAKE/lost"; exit 255; }; }\n'
        'case "$*" in\n'
        "  *' describe '*) echo READY ;;\n"
        "  *'worker.sh state'*) lose state; echo running ;;\n"
        "  *'worker.sh follow'*) lose follow ;;\n"
        "  *'worker.sh ended'*) echo 'ended 0 99' ;;\n"
        "  *) exit 1 ;;\nesac\n",
    )
    done = bench.tpu(statuses=None)
    assert done.returncode == code, done.stderr
    assert ("unreachable" in done.stderr) == bool(code)
    assert (bench.fake / "lost").read_text().split() == []


@pytest.mark.slow
def test_late_crashes_do_not_end_it(bench):
    (bench.fake / "tpu-vm").write_text("READY")
    done = bench.tpu("--max_failures=2", "--quick=0", statuses="1\n1\n1\n0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        pytest.param("2", 2, marks=pytest.mark.slow),
        pytest.param("75 2", 2, marks=pytest.mark.slow),
        pytest.param("143", 143, marks=pytest.mark.slow),
        ("75 143", 143),
        ("130", 130),
    ],
)
def test_a_mistake_and_a_stop_are_not_restarted(bench, statuses, code):
    (bench.fake / "tpu-vm").write_text("READY")
    assert bench.tpu(statuses=statuses).returncode == code
    assert bench.verbs() == FIRST


def test_no_capacity_is_retried_and_a_refusal_is_reported(bench):
    (bench.fake / "refusals").write_text('There is no more capacity in the zone "z"')
    assert bench.tpu().returncode == 0
    assert bench.verbs() == ["tpu-vm create", "tpu-vm create", *FIRST]
    (bench.fake / "tpu-vm").unlink()
    (bench.fake / "refusals").write_text("Quota limit 'TPUS' has been exceeded.")
    done = bench.tpu()
    assert done.returncode == 1
    assert "Quota limit" in done.stderr and "could not be created" in done.stderr


@pytest.mark.slow
def test_an_unknown_state_creates_nothing(bench):
    (bench.fake / "tpu-vm").write_text("NO_NETWORK NO_NETWORK READY")
    assert bench.tpu().returncode == 0
    (bench.fake / "tpu-vm").write_text("NO_NETWORK")
    done = bench.tpu()
    assert done.returncode == 1 and "cannot determine the state" in done.stderr
    assert bench.verbs() == FIRST


def test_mounts_a_share_or_a_bucket_on_every_worker(bench):
    bench.record("sudo", "mount.nfs", "gcsfuse")
    bench.record("mountpoint", code=1)
    assert bench.tpu("--mount=10.0.0.2:/runs").returncode == 0
    options = "hard,lookupcache=positive,actimeo=1"
    mount = ["mount", "-t", "nfs", "-o", options, "10.0.0.2:/runs", "/mnt/runs"]
    assert bench.calls("sudo").count(mount) == 2
    assert bench.tpu("--mount=gs://my-bucket/", statuses="0\n0").returncode == 0
    (gcsfuse, other) = bench.calls("gcsfuse")
    assert gcsfuse == other
    assert gcsfuse[-2:] == ["my-bucket", "/mnt/runs"]
    assert {"--metadata-cache-ttl-secs=0", "--rename-dir-limit=0"} < set(gcsfuse)


def test_dry_run_prints_what_would_run_and_runs_nothing(bench):
    bench.record("gcloud", code=1)
    printed = bench.tpu("--dry_run", "--queued", "--mount=gs://b")
    assert printed.returncode == 0, printed.stderr
    assert bench.calls("gcloud") == []
    # A shell that runs the printed commands makes the same calls.
    bench.record("gcloud", "tar", "env")
    subprocess.run(["bash", "-euc", printed.stdout], env=bench.env, check=True, timeout=20)
    assert bench.verbs() == ["queued-resources create", *FIRST]
    start = next(call for call in bench.calls("gcloud") if "worker.sh start" in " ".join(call))
    command = next(a for a in start if a.startswith("--command="))
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command.removeprefix('--command=')}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert words[-len(PROGRAM_FLAGS) :] == PROGRAM_FLAGS


@pytest.mark.parametrize(
    ("flags", "program", "message"),
    [
        (["--sopt"], PROGRAM_FLAGS, "unknown flag --sopt"),
        (["--name="], PROGRAM_FLAGS, "--name and --zone"),
        (["--version="], PROGRAM_FLAGS, "--type and --version"),
        ([], [], "the program's flags are missing"),
    ],
)
def test_error_messages(bench, flags, program, message):
    done = bench.tpu(*flags, program=program)
    assert done.returncode == 2 and message in done.stderr
    assert bench.calls("gcloud") == []
