"""Run tools/launch_* with bash, with the programs of the clouds replaced by fakes.

The fake gcloud keeps a slice of two workers in a folder. It goes through the states it is given and
runs each worker's commands in that worker's home, so that quoting is tested from end to end.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGING = ("setup.py", "pyproject.toml", "README.md")  # needed to install the package
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


def states(of):  # the coming states; the last one stays
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

# Replaces `uv` and creates a replacement for Python, which records its arguments and exits with the
# next status of the file `statuses` (one line per start, one status per worker).
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
(home / "environment.json").write_text(json.dumps(dict(os.environ)))
(fake / f"{{home.name}}_start_{{count}}").touch()
if status == "waits":
    time.sleep(30)
sys.exit(int(status))
"""


class Bench:
    """A folder with replacements for cloud programs, first on the PATH.

    Attributes:
        fake: The folder, which also records calls.
        bin: Its folder of programs.
        env: Environment variables of the launchers.
    """

    def __init__(self, folder: Path):
        self.fake = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "program").write_text(PROGRAM)
        (folder / "program").chmod(0o755)
        # A small repository, which is quick to copy.
        for file in (*PACKAGING, "cap_pretrain/main.py", "configs/quickstart.py"):
            (folder / "repository" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / "repository" / file)
        (folder / "repository/tools").mkdir()
        for script in [*ROOT.glob("tools/launch_tpu*"), ROOT / "tools/launch_options.sh"]:
            shutil.copy(script, folder / "repository/tools")
        self.put("gcloud", f"#!{sys.executable} -ISs\n{GCLOUD}")
        self.put("uv", UV)
        self.record("sudo")
        self.env = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "FAKE": str(folder),
            "HOME": str(folder),
            "TMPDIR": str(folder),
        }

    def put(self, name: str, text: str) -> None:
        """Write a program."""
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def record(self, *names: str, code: int = 0) -> None:
        """Write programs that only record their arguments."""
        for name in names:
            self.put(
                name,
                f"#!{sys.executable} -ISs\nimport json, os, sys\n"
                f'with open(os.environ["FAKE"] + "/{name}.jsonl", "a") as log:\n'
                f'    log.write(json.dumps(sys.argv[1:]) + "\\n")\nsys.exit({code})\n',
            )

    def calls(self, name: str) -> list[list[str]]:
        """Return the recorded arguments of each call of a program."""
        path = self.fake / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self) -> list[str]:
        """Return what gcloud was called for, except for queries of states."""
        found = []
        for _, _, kind, verb, *rest in self.calls("gcloud"):
            command = next((a for a in rest if a.startswith("--command=")), "")
            if "worker.sh state" in command or verb == "describe":
                continue
            _, _, ours = command.partition("launch_tpu_worker.sh ")
            found.append(ours.split()[0] if ours else "unpack" if command else f"{kind} {verb}")
        return found

    def start(
        self, *flags: str, program: Sequence[str] = PROGRAM_FLAGS, **options
    ) -> subprocess.Popen:
        """Start tools/launch_tpu.sh."""
        command = [
            *("bash", self.fake / "repository/tools/launch_tpu.sh", "--name=pod", "--zone=z"),
            *("--poll=0", "--type=v5litepod-256", "--version=v2-alpha-tpuv5-lite", *flags),
            *(["--", *program] if program else []),
        ]
        return subprocess.Popen(command, env=self.env, **options)

    def tpu(
        self, *flags: str, statuses: str | None = "0", program: Sequence[str] = PROGRAM_FLAGS
    ) -> subprocess.CompletedProcess:
        """Run tools/launch_tpu.sh with a program that exits with these statuses."""
        if statuses:
            (self.fake / "statuses").write_text(statuses)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with self.start(*flags, program=program, **pipes) as process:
            out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)
