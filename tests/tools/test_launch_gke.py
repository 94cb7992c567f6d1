"""Tests of tools/launch_gke.sh."""

import re
import subprocess

import pytest
import yaml

from tests.tools.launchers import PROGRAM_FLAGS, ROOT

FLAGS = (
    *("--name=cap", "--image=eu.pkg.dev/p/r/cap:1", "--accelerator=tpu-v5-lite-podslice"),
    "--topology=16x16",
)


def run(bench, *flags, program=PROGRAM_FLAGS):
    bench.put(
        "kubectl",
        '#!/bin/bash\necho "$*" >>"$FAKE/kubectl"\n[[ $1 != create ]] || cat >"$FAKE/made"\n',
    )
    return subprocess.run(
        ["bash", ROOT / "tools/launch_gke.sh", *FLAGS, *flags, "--", *program],
        env=bench.env,
        capture_output=True,
        text=True,
        timeout=20,
    )


def manifest(bench, *flags):
    done = run(bench, "--dry_run", *flags)
    assert done.returncode == 0, done.stderr
    assert not (bench.fake / "kubectl").exists()
    return yaml.safe_load(done.stdout)


def test_one_pod_per_host_with_all_flags(bench):
    made = manifest(bench, "--mount=10.0.0.2:/runs", "--service_account=cap")
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
    # Kubernetes replaces $$ by $ and expands $(NAME).
    assert [flag.replace("$$", "$") for flag in main["args"]] == PROGRAM_FLAGS
    assert all(flag.count("$") % 2 == 0 for flag in main["args"])
    assert main["resources"]["limits"] == {"google.com/tpu": 4}
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert main["resources"]["requests"] == {
        "google.com/tpu": 4,
        "memory": "96G",
        "ephemeral-storage": "11G",  # the 64th part of the cache's 64 GB, and 10
    }
    assert volumes["runs"]["nfs"] == {"server": "10.0.0.2", "path": "/runs"}
    assert {m["name"]: m["mountPath"] for m in main["volumeMounts"]}["runs"] == "/mnt/runs"


def test_mistakes_end_the_job_and_preemptions_do_not_count(bench):
    made = manifest(bench, "--mount=gs://b", "--spot", "--max_restarts=3")
    policy = made["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    mistake, preempted = policy["rules"]
    assert mistake["action"] == "FailJobSet"
    assert preempted["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    spec = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    # The message of the Kubernetes job controller.
    failed = "Container main for pod default/cap-hosts-0-0 failed with exit code {} matching"
    (pattern,) = mistake["onJobFailureMessagePatterns"]
    assert re.search(pattern, failed.format(2)) and not re.search(pattern, failed.format(143))
    assert not re.search(pattern, failed.format(23))
    killed, by_code, by_condition = spec["podFailurePolicy"]["rules"]
    # The first rule that matches decides. A pod evicted for its use of memory matches the last too.
    assert (killed["action"], killed["onExitCodes"]["values"]) == ("Count", [137])
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
def test_hosts_of_other_slices(bench, topology, chips, hosts):
    flags = (f"--topology={topology}", f"--chips_per_host={chips}", "--mount=h:/s")
    spec = manifest(bench, *flags)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["parallelism"] == hosts
    (main,) = spec["template"]["spec"]["containers"]
    assert main["resources"]["requests"]["google.com/tpu"] == chips


def test_a_workdir_in_a_bucket_needs_no_mount(bench):
    flags = ("--config=c", "--workdir=gs://b/run", "--config.data.cache=/dev/shm/data")
    flags += ("-config.data.cache_gb", "100.5")
    done = run(bench, "--dry_run", "--hugepages", "--env=NO=$(B) it's", "--disk=500", program=flags)
    assert done.returncode == 0, done.stderr
    (job,) = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    assert [volume["name"] for volume in pod["volumes"]] == ["memory"]
    (main,) = pod["containers"]
    assert [mount["name"] for mount in main["volumeMounts"]] == ["memory"]
    requests = main["resources"]["requests"]
    assert (requests["memory"], requests["ephemeral-storage"]) == ("98G", "500G")
    assert main["env"] == [{"name": "NO", "value": "$$(B) it's"}]
    (hugepages,) = pod["initContainers"]
    assert hugepages["securityContext"] == {"privileged": True}
    assert "transparent_hugepage/enabled" in hugepages["command"][-1]


def test_replaces_the_job_of_that_name(bench):
    done = run(bench, "--mount=h:/s")
    assert done.returncode == 0, done.stderr
    assert (bench.fake / "kubectl").read_text().splitlines() == [
        "delete jobset cap --ignore-not-found --cascade=foreground",
        "create -f -",
    ]
    assert yaml.safe_load((bench.fake / "made").read_text())["metadata"]["name"] == "cap"
    assert "kubectl logs" in done.stdout


@pytest.mark.parametrize(
    ("flags", "program", "message"),
    [
        ([], PROGRAM_FLAGS, "--mount: is required"),
        (["--topology="], PROGRAM_FLAGS, "--topology are required"),
        (["--mount=h:/s"], [], "program's flags"),
        (["--mount=h:/s", "--topology=big"], PROGRAM_FLAGS, "--topology=big"),
        (["--mount=h:/s", "--topology=3x3"], PROGRAM_FLAGS, "does not divide"),
        (["--mount=h:/s"], ["--config=a\nb", "--workdir=c"], "line break"),
    ],
)
def test_mistakes_delete_nothing(bench, flags, program, message):
    done = run(bench, *flags, program=program)
    assert done.returncode == 2 and message in done.stderr
    assert not (bench.fake / "kubectl").exists()
