"""What tools/launch_* would run: bash, with the programs of the clouds replaced by stand-ins.

The stand-in of gcloud keeps a slice of two workers in a folder: it has the states it is told, and
runs what is sent to a worker in that worker's home, so that quoting is tried from end to end.
"""

import concurrent.futures
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROGRAM_FLAGS = [
    "--config=configs/quickstart.py",
    "--workdir=/mnt/runs/my cap",
    "--config.data.split=train[:95%]",
    '--config.text.prompt=it\'s $HOME & "all"; (*)',
]

GCLOUD = r"""
import json, os, shutil, subprocess, sys
from pathlib import Path

fake, argv = Path(os.environ["FAKE"]), sys.argv[1:]
with open(fake / "gcloud.jsonl", "a") as log:
    log.write(json.dumps(argv) + "\n")
kind, verb = argv[2:4]


def flag(name):
    return next((a.partition("=")[2] for a in argv if a.startswith(f"--{name}=")), None)


def states(of):  # the states that are still to come; the last one stays
    path = fake / of
    return path, path.read_text().split() if path.exists() else []


if verb == "describe":
    path, coming = states(kind)
    if not coming:
        sys.exit(f"ERROR: NOT_FOUND: Resource 'projects/p/nodes/{argv[4]}' was not found.")
    if coming[0] == "NO_NETWORK":
        print("ERROR: connection refused", file=sys.stderr)
    else:
        print(coming[0])
    path.write_text("\n".join(coming[1:] or coming))
    sys.exit(coming[0] == "NO_NETWORK")
elif verb == "create":
    if (fake / "refusals").exists():
        reason, *left = (fake / "refusals").read_text().splitlines()
        (fake / "refusals").write_text("\n".join(left)) if left else (fake / "refusals").unlink()
        sys.exit(f"ERROR: {reason}")
    if kind == "queued-resources":
        (fake / kind).write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    (fake / "tpu-vm").write_text("CREATING CREATING READY")
elif verb == "delete":
    for each in ("tpu-vm", "queued-resources"):
        (fake / each).unlink(missing_ok=True)
    for each in fake.glob("worker?"):
        shutil.rmtree(each)
else:
    if states("tpu-vm")[1][0] != "READY":
        sys.exit("ERROR: the TPU is in state PREEMPTED")
    workers = ["0", "1"] if flag("worker") == "all" else [flag("worker")]
    for worker in workers:
        home = fake / f"worker{worker}"
        home.mkdir(exist_ok=True)
        if verb == "scp":
            shutil.copy(argv[4], home)
            continue
        code = subprocess.run(
            ["bash", "-c", flag("command")], cwd=home, env=os.environ | {"HOME": str(home)}
        ).returncode
        if code:
            sys.exit(code)
"""

# Stands in for `uv`, and makes a stand-in for the Python in which the program runs: that notes
# its arguments and ends with the next status of `statuses` (a line for each start).
UV = r"""#!/bin/bash
echo "$*" >>"$FAKE/uv"
[[ $1 == venv ]] || exit 0
mkdir -p venv/bin
cp "$FAKE/program" venv/bin/python
"""
PROGRAM = f"""#!{sys.executable} -ISs
import json, os, signal, sys, time
from pathlib import Path

fake, home = Path(os.environ["FAKE"]), Path(os.environ["HOME"])
started = home / "started.jsonl"
with open(fake / f"{{home.name}}.jsonl", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
count = len((fake / f"{{home.name}}.jsonl").read_text().splitlines())
action = (fake / "statuses").read_text().splitlines()[count - 1].split()
status = action[min(int(home.name[-1]), len(action) - 1)]
if status == "preempted":
    (fake / "tpu-vm").write_text(os.environ["AFTER"])
    if (fake / "queued-resources").exists():
        (fake / "queued-resources").write_text("SUSPENDING SUSPENDED")
    status = 143
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
print("step", count, flush=True)
(fake / f"{{home.name}}_start_{{count}}").touch()
if status == "waits":
    time.sleep(30)
sys.exit(int(status))
"""


class Bench:
    """A folder with the stand-ins, first on the PATH."""

    def __init__(self, folder: Path):
        self.fake = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "program").write_text(PROGRAM)
        (folder / "program").chmod(0o755)
        # A small repository, so that copying it costs nothing.
        for file in ("setup.py", "cap_pretrain/main.py", "configs/quickstart.py"):
            (folder / "repository" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / "repository" / file)
        (folder / "repository/tools").mkdir()
        for script in ROOT.glob("tools/launch_tpu*"):
            shutil.copy(script, folder / "repository/tools")
        self.put("gcloud", f"#!{sys.executable} -ISs\n{GCLOUD}")
        self.put("uv", UV)
        self.env = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "FAKE": str(folder),
            "HOME": str(folder),
            "TMPDIR": str(folder),
        }

    def put(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def record(self, *names: str, code: int = 0) -> None:
        """Makes stand-ins that only note that they were called, and with what."""
        for name in names:
            self.put(
                name,
                f"#!{sys.executable} -ISs\nimport json, os, sys\n"
                f'with open(os.environ["FAKE"] + "/{name}.jsonl", "a") as log:\n'
                f'    log.write(json.dumps(sys.argv[1:]) + "\\n")\nsys.exit({code})\n',
            )

    def calls(self, name: str) -> list[list[str]]:
        path = self.fake / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """What gcloud was asked for, but for looks at how things are."""
        found = []
        for _, _, kind, verb, *rest in self.calls("gcloud"):
            command = next((a for a in rest if a.startswith("--command=")), "")
            if "worker.sh state" in command or verb == "describe":
                continue
            _, _, ours = command.partition("launch_tpu_worker.sh ")
            found.append(ours.split()[0] if ours else "unpack" if command else f"{kind} {verb}")
        return found

    def start(self, *flags: str, program: list[str] = PROGRAM_FLAGS, **options) -> subprocess.Popen:
        command = [
            *("bash", self.fake / "repository/tools/launch_tpu.sh", "--name=pod", "--zone=z"),
            *("--poll=0", "--type=v5litepod-256", "--version=v2-alpha-tpuv5-lite", *flags),
            *(["--", *program] if program else []),
        ]
        return subprocess.Popen(command, env=self.env, **options)

    def tpu(self, *flags: str, statuses: str | None = "0", program: list[str] = PROGRAM_FLAGS):
        """Runs tools/launch_tpu.sh; the program is to end with these statuses."""
        if statuses:
            (self.fake / "statuses").write_text(statuses)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with self.start(*flags, program=program, **pipes) as process:
            out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


INSTALL = ["tpu-vm scp", "unpack", "install"]
AGAIN = ["start", "follow", "ended"]
FIRST = [*INSTALL, *AGAIN]


def test_creates_the_slice_installs_and_runs(bench):
    done = bench.tpu("--spot", "--create_flag=--network=my net")
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
        assert (bench.fake / worker / "cap_pretrain/cap_pretrain/main.py").is_file()


def test_a_ready_slice_is_used_and_a_running_program_followed(bench):
    (bench.fake / "tpu-vm").write_text("READY")
    worker = bench.fake / "worker0/cap_pretrain"
    for done in (bench.tpu("--project=p", statuses="0\n0"), bench.tpu(statuses="0\n0")):
        assert done.returncode == 0, done.stderr
    assert bench.verbs() == [*FIRST, *FIRST]
    assert all("--project=p" in call for call in bench.calls("gcloud")[:3])
    assert len(bench.calls("worker1")) == 2
    assert len(list(worker.glob("run/log*"))) == 2  # none is overwritten

    # Ctrl-C leaves it running.
    (bench.fake / "statuses").write_text("0\n0\nwaits")
    launcher = bench.start(
        start_new_session=True,
        # Where the tests run in the background, it is ignored, and bash would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stderr=subprocess.PIPE,
        text=True,
    )
    ready = [bench.fake / f"worker{i}_start_3" for i in range(2)]
    while not all(path.exists() for path in ready) or bench.verbs()[-1] != "follow":
        time.sleep(0.05)
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(20) == 130
    assert "the program goes on" in launcher.stderr.read()

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


@pytest.mark.parametrize("after", ["READY READY READY PREEMPTED", "PREEMPTED"])
def test_a_preempted_slice_is_made_again_and_the_run_goes_on(bench, after):
    (bench.fake / "tpu-vm").write_text("READY")
    bench.env["AFTER"] = after  # in the second case the workers cannot tell how it ended
    done = bench.tpu("--max_failures=1", statuses="preempted\n0")
    assert done.returncode == 0, done.stderr
    again = ["tpu-vm delete", "tpu-vm create", *FIRST]
    assert bench.verbs()[-len(again) :] == again
    assert len(bench.calls("worker0")) == 2


def test_a_preempted_slice_found_at_the_start_is_made_again(bench):
    (bench.fake / "tpu-vm").write_text("PREEMPTED")
    assert bench.tpu().returncode == 0
    assert bench.verbs() == ["tpu-vm delete", "tpu-vm create", *FIRST]


def test_a_queued_resource_is_waited_for_and_asked_for_again(bench):
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


def test_a_crash_is_started_again_and_a_lost_host(bench):
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


@pytest.mark.slow
def test_late_crashes_do_not_end_it(bench):
    (bench.fake / "tpu-vm").write_text("READY")
    done = bench.tpu("--max_failures=2", "--quick=0", statuses="1\n1\n1\n0")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("statuses", "code"), [("2", 2), ("75 2", 2), ("143", 143), ("75 143", 143), ("130", 130)]
)
def test_a_mistake_and_a_stop_are_not_started_again(bench, statuses, code):
    (bench.fake / "tpu-vm").write_text("READY")
    assert bench.tpu(statuses=statuses).returncode == code
    assert bench.verbs() == FIRST


def test_no_capacity_is_tried_again_and_a_refusal_is_told(bench):
    (bench.fake / "refusals").write_text('There is no more capacity in the zone "z"')
    assert bench.tpu().returncode == 0
    assert bench.verbs() == ["tpu-vm create", "tpu-vm create", *FIRST]
    (bench.fake / "tpu-vm").unlink()
    (bench.fake / "refusals").write_text("Quota limit 'TPUS' has been exceeded.")
    done = bench.tpu()
    assert done.returncode == 1
    assert "Quota limit" in done.stderr and "could not be created" in done.stderr


@pytest.mark.slow
def test_a_state_that_cannot_be_told_creates_nothing(bench):
    (bench.fake / "tpu-vm").write_text("NO_NETWORK NO_NETWORK READY")
    assert bench.tpu().returncode == 0
    (bench.fake / "tpu-vm").write_text("NO_NETWORK")
    done = bench.tpu()
    assert done.returncode == 1 and "cannot tell the state" in done.stderr
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
    # What it prints can be given to a shell: the same commands come out.
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
    ("flags", "program", "told"),
    [
        (["--sopt"], PROGRAM_FLAGS, "there is no flag --sopt"),
        (["--name="], PROGRAM_FLAGS, "--name and --zone"),
        (["--version="], PROGRAM_FLAGS, "--type and --version"),
        ([], [], "the program's flags are missing"),
    ],
)
def test_mistakes_are_told(bench, flags, program, told):
    done = bench.tpu(*flags, program=program)
    assert done.returncode == 2 and told in done.stderr
    assert bench.calls("gcloud") == []


class TestSlurm:
    def run(self, bench, *flags, statuses="0", requeue=0, program=PROGRAM_FLAGS):
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
        script = bench.fake / "slurm_script"  # Slurm runs a copy
        shutil.copy(ROOT / "tools/launch_slurm.sbatch", script)
        return subprocess.run(
            ["bash", script, "--pause=0", *flags, *(["--", *program] if program else [])],
            env=bench.env | {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "12"},
            capture_output=True,
            text=True,
            timeout=20,
        )

    def test_runs_a_process_a_node_with_all_flags(self, bench):
        assert self.run(bench).returncode == 0
        (call,) = bench.calls("srun")
        assert call[:3] == ["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=300"]
        assert call[3:] == ["python", "-u", "-m", "cap_pretrain.main", *PROGRAM_FLAGS]
        assert (bench.fake / "cpus").read_text() == "12"
        assert bench.calls("scontrol") == []

    @pytest.mark.parametrize("requeue", [0, 1])
    def test_the_end_of_its_time_queues_it_again(self, bench, requeue):
        done = self.run(bench, statuses="143", requeue=requeue)
        assert done.returncode == 143
        assert bench.calls("scontrol") == [["requeue", "7"]]
        assert len(bench.calls("srun")) == 1
        assert ("not queued again" in done.stderr) == bool(requeue)

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
    def test_crashes_are_started_again_in_the_same_job(self, bench, flags, statuses, code, starts):
        assert self.run(bench, *flags, statuses=statuses).returncode == code
        assert len(bench.calls("srun")) == starts
        assert bench.calls("scontrol") == []

    def test_dry_run_and_mistakes(self, bench):
        done = self.run(bench, "--dry_run")
        assert bench.calls("srun") == []
        assert "scontrol requeue 7" in done.stdout
        subprocess.run(
            ["bash", "-euc", done.stdout.splitlines()[0]],
            env=bench.env | {"SRUN_CPUS_PER_TASK": "1"},
            check=True,
        )
        assert bench.calls("srun")[0][-len(PROGRAM_FLAGS) :] == PROGRAM_FLAGS
        assert self.run(bench, "--what").returncode == 2
        assert self.run(bench, program=[]).returncode == 2

    def test_slurm_is_told_to_signal_the_processes_and_to_queue_again(self):
        text = (ROOT / "tools/launch_slurm.sbatch").read_text()
        before = text[: text.index("set -euo")]  # Slurm stops reading at the first command
        for option in ("--signal=TERM@300", "--requeue", "--ntasks-per-node=1"):
            assert f"\n#SBATCH {option}\n" in before


class TestGke:
    FLAGS = (
        *("--name=cap", "--image=eu.pkg.dev/p/r/cap:1", "--accelerator=tpu-v5-lite-podslice"),
        "--topology=16x16",
    )

    def run(self, bench, *flags, program=PROGRAM_FLAGS):
        bench.put(
            "kubectl",
            '#!/bin/bash\necho "$*" >>"$FAKE/kubectl"\n[[ $1 != create ]] || cat >"$FAKE/made"\n',
        )
        return subprocess.run(
            ["bash", ROOT / "tools/launch_gke.sh", *self.FLAGS, *flags, "--", *program],
            env=bench.env,
            capture_output=True,
            text=True,
            timeout=20,
        )

    def manifest(self, bench, *flags):
        done = self.run(bench, "--dry_run", *flags)
        assert done.returncode == 0, done.stderr
        assert not (bench.fake / "kubectl").exists()
        return yaml.safe_load(done.stdout)

    def test_a_pod_for_every_host_with_all_flags(self, bench):
        made = self.manifest(bench, "--mount=10.0.0.2:/runs", "--service_account=cap")
        assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
        (job,) = made["spec"]["replicatedJobs"]
        spec = job["template"]["spec"]
        assert spec["parallelism"] == spec["completions"] == 64
        assert spec["backoffLimit"] == 0
        pod = spec["template"]["spec"]
        assert pod["nodeSelector"] == {
            "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
            "cloud.google.com/gke-tpu-topology": "16x16",
        }
        assert pod["serviceAccountName"] == "cap"
        (main,) = pod["containers"]
        assert main["image"] == "eu.pkg.dev/p/r/cap:1"
        assert main["command"] == ["python", "-u", "-m", "cap_pretrain.main"]
        # Kubernetes makes one $ of two, and looks up $(NAME).
        assert [flag.replace("$$", "$") for flag in main["args"]] == PROGRAM_FLAGS
        assert all(flag.count("$") % 2 == 0 for flag in main["args"])
        assert main["resources"]["limits"] == {"google.com/tpu": 4}
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert volumes["runs"]["nfs"] == {"server": "10.0.0.2", "path": "/runs"}
        assert {m["name"]: m["mountPath"] for m in main["volumeMounts"]}["runs"] == "/mnt/runs"

    def test_mistakes_end_it_preemptions_do_not_count(self, bench):
        made = self.manifest(bench, "--mount=gs://b", "--spot", "--max_restarts=3")
        policy = made["spec"]["failurePolicy"]
        assert policy["maxRestarts"] == 3
        mistake, preempted = policy["rules"]
        assert mistake["action"] == "FailJobSet"
        assert preempted["action"] == "RestartJobSetAndIgnoreMaxRestarts"
        spec = made["spec"]["replicatedJobs"][0]["template"]["spec"]
        # As the Kubernetes job controller words it.
        failed = "Container main for pod default/cap-hosts-0-0 failed with exit code {} matching"
        (pattern,) = mistake["onJobFailureMessagePatterns"]
        assert re.search(pattern, failed.format(2)) and not re.search(pattern, failed.format(143))
        assert not re.search(pattern, failed.format(23))
        by_code, by_condition = spec["podFailurePolicy"]["rules"]
        assert by_code["onExitCodes"]["values"] == [2, 143]
        assert by_condition["onPodConditions"][0]["type"] == "DisruptionTarget"
        pod = spec["template"]
        assert pod["spec"]["restartPolicy"] == "Never"
        assert pod["spec"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
        assert pod["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
        bucket = pod["spec"]["volumes"][1]["csi"]["volumeAttributes"]
        assert bucket["bucketName"] == "b"
        assert "rename-dir-limit:0" in bucket["mountOptions"]

    @pytest.mark.parametrize(("topology", "chips", "hosts"), [("4x4x4", 4, 16), ("2x4", 8, 1)])
    def test_hosts_of_other_slices(self, bench, topology, chips, hosts):
        flags = (f"--topology={topology}", f"--chips_per_host={chips}", "--mount=h:/s")
        spec = self.manifest(bench, *flags)["spec"]["replicatedJobs"][0]["template"]["spec"]
        assert spec["parallelism"] == hosts
        (main,) = spec["template"]["spec"]["containers"]
        assert main["resources"]["requests"] == {"google.com/tpu": chips}

    def test_replaces_the_job_of_that_name(self, bench):
        done = self.run(bench, "--mount=h:/s")
        assert done.returncode == 0, done.stderr
        assert (bench.fake / "kubectl").read_text().splitlines() == [
            "delete jobset cap --ignore-not-found --cascade=foreground",
            "create -f -",
        ]
        assert yaml.safe_load((bench.fake / "made").read_text())["metadata"]["name"] == "cap"
        assert "kubectl logs" in done.stdout

    @pytest.mark.parametrize(
        ("flags", "program", "told"),
        [
            ([], PROGRAM_FLAGS, "--mount is missing"),
            (["--mount=h:/s"], [], "program's flags"),
            (["--mount=h:/s", "--topology=big"], PROGRAM_FLAGS, "--topology=big"),
            (["--mount=h:/s", "--topology=3x3"], PROGRAM_FLAGS, "does not divide"),
            (["--mount=h:/s"], ["--config=a\nb", "--workdir=c"], "two lines"),
        ],
    )
    def test_mistakes_delete_nothing(self, bench, flags, program, told):
        done = self.run(bench, *flags, program=program)
        assert done.returncode == 2 and told in done.stderr
        assert not (bench.fake / "kubectl").exists()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Runs the commands of docs/tpu_pod.md; returns the stand-ins and what was printed."""
    bench = Bench(tmp_path_factory.mktemp("page"))
    names = ("pip", "python", "ssh-keygen", "ssh-add", "ssh-agent", "docker", "kubectl")
    bench.record(*names, "scontrol", "scancel", "gcloud")
    recorded = (bench.bin / "gcloud").read_text().replace("sys.exit(0)", "print('10.0.0.2')")
    bench.put("gcloud", recorded)
    # As Slurm: the script runs with what stands behind it.
    bench.put("sbatch", '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec bash "$@"\n')
    text = (ROOT / "docs/tpu_pod.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    script, count = re.subn(
        r"(tools/launch_\S+\.(?:sh|sbatch)) ", r"\1 --dry_run ", "".join(blocks)
    )
    assert count == 4
    done = subprocess.run(
        ["bash", "-euc", script],
        cwd=ROOT,
        env=bench.env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return bench, done.stdout


class TestPage:
    """docs/tpu_pod.md: its commands, from top to bottom, with stand-ins; our launchers dry."""

    def test_its_launchers_would_run_what_it_says(self, page):
        _, printed = page
        lines = printed.splitlines()
        (create,) = [line for line in lines if " queued-resources create " in line]
        assert create.startswith("gcloud compute tpus queued-resources create cap --node-id=cap ")
        assert "--accelerator-type=v5litepod-256 --spot --zone=us-west4-a" in create
        assert any(line.endswith("install 10.0.0.2:/runs' --zone=us-west4-a") for line in lines)
        assert any("launch_tpu_worker.sh stop" in line for line in lines)
        assert "        parallelism: 64" in lines
        (srun,) = [line for line in lines if line.startswith("srun ")]
        assert "--config=configs/pretrain.py:objective=cap" in srun

    def test_its_names_reach_the_clouds_programs(self, page):
        bench, _ = page
        commands = [" ".join(call) for call in bench.calls("gcloud")]
        assert "config set project my-project" in commands
        assert any(
            c.startswith("filestore instances create cap-runs --zone=us-west4-a") for c in commands
        )
        assert any("--location=us-west4 " in c for c in commands)  # the zone's region
        assert any("--member=serviceAccount:10.0.0.2-compute@" in c for c in commands)
        pool = next(c for c in commands if c.startswith("container node-pools create"))
        assert "--tpu-topology=16x16 --num-nodes=64" in pool

    def test_its_configs_and_fields_are_ours(self, page):
        bench, printed = page
        manifest = printed[printed.index("apiVersion:") :].partition("\nsrun ")[0]
        (job,) = yaml.safe_load(manifest)["spec"]["replicatedJobs"]
        (main,) = job["template"]["spec"]["template"]["spec"]["containers"]
        shell = [
            shlex.split(part)
            for line in printed.splitlines()
            if "--config=" in line and not line.startswith(" ")
            for part in (shlex.split(line) if line.startswith("gcloud") else [line])
            if "--config=" in part
        ]
        for flags in (main["args"], *shell, *bench.calls("python")):
            (chosen,) = [flag for flag in flags if flag.startswith("--config=")]
            path, _, argument = chosen.removeprefix("--config=").partition(":")
            spec = importlib.util.spec_from_file_location("page_config", ROOT / path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            config = module.get_config(argument).copy_and_resolve_references()
            for flag in flags:
                if flag.startswith("--config."):
                    field, _, value = flag.removeprefix("--config.").partition("=")
                    config.update_from_flattened_dict({field: type(_at(config, field))(value)})
        assert len(shell) == 2  # TPU VMs and Slurm

    def test_its_files_are_there(self):
        text = (ROOT / "docs/tpu_pod.md").read_text()
        for path in set(re.findall(r"(?<!/)\b(?:tools|configs)/[\w.]+\w", text)):
            assert (ROOT / path).is_file(), path


def _at(config, field):
    for part in field.split("."):
        config = config[part]
    return config
