"""Tests of docs/tpu_pod.md: runs its commands from top to bottom, with fakes and dry launchers."""

import importlib.util
import re
import shlex
import subprocess

import numpy as np
import pytest
import yaml

from cap_pretrain import config as configs
from cap_pretrain.data import blocks
from cap_pretrain.data.sources import base
from tests.tools.launchers import ROOT, Bench


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Run the commands of docs/tpu_pod.md; return the fakes and what was printed."""
    bench = Bench(tmp_path_factory.mktemp("page"))
    names = ("pip", "python", "cap", "ssh-keygen", "ssh-add", "ssh-agent", "docker", "kubectl")
    bench.record(*names, "scontrol", "scancel", "gcloud")
    recorded = (bench.bin / "gcloud").read_text().replace("sys.exit(0)", "print('10.0.0.2')")
    bench.put("gcloud", recorded)
    # Like Slurm: runs the script with the arguments behind it.
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


def test_launchers_run_what_the_page_says(page):
    _, printed = page
    lines = printed.splitlines()
    (create,) = [line for line in lines if " queued-resources create " in line]
    assert create.startswith("gcloud compute tpus queued-resources create cap --node-id=cap ")
    assert "--accelerator-type=v5litepod-256 --spot --zone=us-west4-a" in create
    assert printed.count("--workdir=gs://my-project-cap/runs/cap") == 2  # TPU VMs and GKE
    assert "/mnt/" not in printed
    assert any("launch_tpu_worker.sh stop" in line for line in lines)
    assert "        parallelism: 64" in lines
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert "--config=configs/pretrain.py:objective=cap" in srun


def test_names_on_the_page_reach_the_cloud_programs(page):
    bench, _ = page
    commands = [" ".join(call) for call in bench.calls("gcloud")]
    assert "config set project my-project" in commands
    (bucket,) = [c for c in commands if c.startswith("storage buckets create")]
    assert bucket.startswith("storage buckets create gs://my-project-cap --location=us-west4 ")
    assert not any("filestore" in c for c in commands)
    assert any("--member=serviceAccount:10.0.0.2-compute@" in c for c in commands)
    pool = next(c for c in commands if c.startswith("container node-pools create"))
    assert "--tpu-topology=16x16 --num-nodes=64" in pool


def test_configs_and_fields_exist(page):
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


def test_files_exist():
    text = (ROOT / "docs/tpu_pod.md").read_text()
    for path in set(re.findall(r"(?<!/)\b(?:tools|configs)/[\w.]+\w", text)):
        assert (ROOT / path).is_file(), path


class Files:
    """Examples of 25 KB in files of 1 GB."""

    example_bytes = 25_000

    def __init__(self, examples):
        most = 10**9 // self.example_bytes
        self.ends = [min(end, examples) for end in range(most, examples + most, most)]

    def __len__(self):
        return self.ends[-1]

    def block_bounds(self, size):
        return base.file_bounds(self.ends, size)


def costs(examples, hosts, batch_size=8192):
    """Return what a row of the table of costs says, by the order of blocks with its defaults."""
    data, files = configs.default().data, Files(examples)
    data.order = "blocks"
    blocks.settle(data, batch_size)
    layout = blocks.Layout(data.block, data.lanes, data.cache_gb)
    order = blocks.BlockOrder([(files, 1.0)], layout, batch_size=batch_size, seed=0)
    (member,) = order._members
    epoch, bounds = member._epochs.get(0, 0, member._make_epoch), files.block_bounds(data.block)
    file_of = np.searchsorted(files.ends, bounds[:-1], side="right")[epoch.order]
    edges = np.arange(data.lanes + 1) * member.lane
    first = epoch.starts.searchsorted(edges[:-1], side="right") - 1  # the blocks of each lane
    last = epoch.starts.searchsorted(edges[1:])
    opened = sum(
        len(np.unique(np.concatenate([file_of[first[v] : last[v]] for v in lanes])))
        for lanes in np.split(np.arange(data.lanes), hosts)
    )
    lists = opened * 6 * len(files) / len(files.ends)
    fetched = np.sum(epoch.starts[last] - epoch.starts[first]) * files.example_bytes
    shown = order.examples * files.example_bytes
    positions = np.array([order(row) for row in range(batch_size)])
    waits = max(map(len, map(np.unique, np.split(bounds.searchsorted(positions, "right"), hosts))))
    gigabytes = waits * data.block * files.example_bytes / 1e9
    return (
        f"| {hosts} | {np.sum(last - first):,} | {2 * opened:,} "
        f"| {shown / 1e12:.2g}{'0' * (shown < 1e12)} TB x {(fetched + lists) / shown:.3f} "
        f"| {waits:,} blocks, {gigabytes:.2g} GB | {data.cache_gb / hosts:g} GB |"
    )


@pytest.mark.parametrize(
    "examples", [12_000_000, pytest.param(10**9, marks=pytest.mark.slow)], ids=["12M", "1B"]
)
def test_the_costs_are_those_of_the_order(examples):
    text = (ROOT / "docs/tpu_pod.md").read_text()
    for hosts in (4, 64, 256):
        assert costs(examples, hosts) in text, costs(examples, hosts)


def _at(config, field):
    for part in field.split("."):
        config = config[part]
    return config
