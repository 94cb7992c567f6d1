"""Tests of tools/launch_slurm.sbatch."""

import shutil
import subprocess
import sys

import pytest

from tests.tools.launchers import PROGRAM_FLAGS, ROOT


def run(bench, *flags, statuses="0", requeue=0, program=PROGRAM_FLAGS, tasks="1"):
    (bench.fake / "statuses").write_text(statuses)
    bench.record("scontrol", code=requeue)
    bench.put(
        "srun",
        f"#!{sys.executable} -ISs\nimport json, os, sys\nfrom pathlib import Path\n"
        'fake = Path(os.environ["FAKE"])\n'
        'with open(fake / "srun.jsonl", "a") as log:\n'
        '    log.write(json.dumps(sys.argv[1:]) + "\\n")\n'
        '(fake / "cpus").write_text(os.environ["SRUN_CPUS_PER_TASK"])\n'
        'status, *left = (fake / "statuses").read_text().split()\n'
        '(fake / "statuses").write_text(" ".join(left))\nsys.exit(int(status))\n',
    )
    script = bench.fake / "slurm_script"  # Slurm runs a copy of the script
    shutil.copy(ROOT / "tools/launch_slurm.sbatch", script)
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12", "SLURM_NTASKS_PER_NODE": tasks}
    return subprocess.run(
        ["bash", script, "--pause=0", *flags, *(["--", *program] if program else [])],
        env=bench.env | job,
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_runs_one_process_per_node_with_all_flags(bench):
    assert run(bench).returncode == 0
    (call,) = bench.calls("srun")
    assert call[:3] == ["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=300"]
    assert call[3:] == ["python", "-u", "-m", "cap_pretrain.main", *PROGRAM_FLAGS]
    assert (bench.fake / "cpus").read_text() == "12"
    assert bench.calls("scontrol") == []


def test_one_process_per_gpu_with_variables(bench):
    done = run(bench, "--env=A=it's $HOME", "--env=B=", tasks="8")
    assert done.returncode == 0, done.stderr
    (call,) = bench.calls("srun")
    assert call[0] == "--ntasks-per-node=8"
    assert call[3:7] == ["env", "A=it's $HOME", "B=", "python"]
    done = run(bench, tasks="a[$(touch PWNED)0]")
    assert done.returncode == 2 and "SLURM_NTASKS_PER_NODE" in done.stderr


@pytest.mark.parametrize("requeue", [0, 1])
def test_the_time_limit_requeues_the_job(bench, requeue):
    done = run(bench, statuses="143", requeue=requeue)
    assert done.returncode == 143
    assert bench.calls("scontrol") == [["requeue", "7"]]
    assert len(bench.calls("srun")) == 1
    assert ("not requeued" in done.stderr) == bool(requeue)


@pytest.mark.parametrize(
    ("flags", "statuses", "code", "starts"),
    [
        ([], "2", 2, 1),
        ([], "130", 130, 1),
        ([], "75 137 0", 0, 3),
        ([], "1 75 1 0", 1, 3),
        (["--max_failures=1"], "1 0", 1, 1),
        (["--quick=0"], "1 1 1 1 0", 0, 5),
    ],
)
def test_crashes_are_restarted_in_the_same_job(bench, flags, statuses, code, starts):
    assert run(bench, *flags, statuses=statuses).returncode == code
    assert len(bench.calls("srun")) == starts
    assert bench.calls("scontrol") == []


def test_dry_run_and_mistakes(bench):
    done = run(bench, "--dry_run")
    assert bench.calls("srun") == []
    assert "scontrol requeue 7" in done.stdout
    subprocess.run(
        ["bash", "-euc", done.stdout.splitlines()[0]],
        env=bench.env | {"SRUN_CPUS_PER_TASK": "1"},
        check=True,
    )
    assert bench.calls("srun")[0][-len(PROGRAM_FLAGS) :] == PROGRAM_FLAGS
    assert run(bench, "--what").returncode == 2
    assert run(bench, program=[]).returncode == 2


def test_slurm_signals_the_processes_and_requeues():
    text = (ROOT / "tools/launch_slurm.sbatch").read_text()
    before = text[: text.index("set -euo")]  # Slurm stops reading at the first command
    for option in ("--signal=TERM@300", "--requeue", "--ntasks-per-node=1"):
        assert f"\n#SBATCH {option}\n" in before
