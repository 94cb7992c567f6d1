"""What `--dry_run` foresees: the memory of a step, whether it fits, and how long the run takes."""

import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cap_pretrain import inputs
from cap_pretrain.distributed.platform import platform_of
from cap_pretrain.telemetry import console, flops
from cap_pretrain.telemetry.metrics import read_metrics
from cap_pretrain.training import automatic

ASSUMED_MFU = {"cpu": 0.2, "gpu": 0.4, "tpu": 0.4}
"""Model FLOP utilization by platform. BENCHMARKS.md: 14% to 27% measured on two CPU cores; 50% on
GPUs and 41% on TPUs predicted for large batches by the compilers, of which runs reach less."""


def datasets(config: ConfigDict, mixture: inputs.Mixture) -> list[str]:
    """Return lines about the sizes of the datasets that a run trains on."""
    weight = sum(weight for _, weight in mixture)
    return [
        f"training data: {source}: {len(source):,} examples"
        + (f", {share / weight:.0%} of each batch" if len(mixture) > 1 else "")
        for source, share in mixture
    ] + [f"image_size {config.data.image_size}, text.length {config.text.length}"]


def memory(
    config: ConfigDict, vocab_size: int, make_optimizer: automatic.MakeOptimizer, total: int = 0
) -> tuple[dict[str, int], str]:
    """Estimate the memory of a step of a run of `total` steps on a present device.

    It is that of the phase that needs most. Returns entries of plan.json's bytes_per_device, and
    lines of text.
    """
    need = automatic.estimate_run(config, vocab_size, make_optimizer, jax.devices(), total)
    entries = {"activations": need.activations, "workspace": need.workspace}
    text = (
        f"activations (estimated from the arrays that the backward pass keeps): "
        f"{_size(need.activations)}, and {_size(need.workspace)} of workspace; "
        f"a step needs about {_size(need.total)} per device"
    )
    limit, what = _limit(jax.local_devices()[0])
    if limit:
        entries["limit"] = limit
        fits = need.total <= automatic.USABLE * limit
        text += f"\n{'it fits' if fits else 'IT DOES NOT FIT'} into {_size(limit)} of {what}"
        if not fits:
            text += "; lower batch_size, raise accumulate, or set model.remat=full"
    return entries, text


def _limit(device: jax.Device) -> tuple[int, str]:
    """Return the bytes that programs may use, 0 if unknown, and of what."""
    if platform_of(device) == "cpu":
        # A host is shared by all devices that it is split into.
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return pages // jax.local_device_count(), "main memory"
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit", 0), f"the memory of a {device.device_kind}"


def duration(plan: Mapping[str, Any], workdir: Path) -> tuple[float, str]:
    """Estimate how long the steps of a run take: seconds, 0 if unknown, and a line of text.

    The pace is the median of an earlier start in the workdir, relative to the arithmetic of its
    steps, or else follows from the arithmetic and `ASSUMED_MFU` of the peak of the present devices.
    """
    steps = plan["total_steps"]
    mean = plan["flops_per_example"]["training"]
    before = [
        line["time/step_ms"] * mean / _flops_at(plan, line["step"])
        for line in read_metrics(workdir)
        if line.get("time/step_ms")
    ]
    if before:
        step_s = statistics.median(before) / 1000
        basis = "as measured in this workdir"
    else:
        peak = flops.system_peak(jax.devices())
        if not peak.flops:
            return 0.0, f"how long it takes is unknown: {peak.source}"
        share = ASSUMED_MFU.get(platform_of(jax.devices()[0]), 0.4)
        step_s = mean * plan["batch_size"] / (share * peak.flops)
        basis = f"estimated, for {share:.0%} of {peak.source}"
    seconds = step_s * steps
    return seconds, (
        f"{steps:,} steps take about {console.short_duration(seconds)}, {1000 * step_s:,.0f} ms "
        f"each ({basis}); start and evaluations come on top"
    )


def _flops_at(plan: Mapping[str, Any], step: int) -> float:
    """Return the FLOPs per example of training in the phase of a step."""
    phases = plan["phases"]
    return next((p["training"] for p in phases if step <= p["stop"]), phases[-1]["training"])


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
