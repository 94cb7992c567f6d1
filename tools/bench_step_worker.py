"""One candidate of tools/bench_step.py in a process of its own: our step, or that of PyTorch.

It reads JSON from standard input, one object a line: first the job, then requests to take steps;
and answers each on standard output. What libraries print goes to standard error.
"""

import contextlib
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `tools`; PYTHONPATH comes first

import numpy as np
from ml_collections import ConfigDict

from cap_pretrain import naflex
from cap_pretrain.errors import UserError
from cap_pretrain.sweeps.trials import Trial, parse_overrides


class Candidate(NamedTuple):
    """A training step that is ready to run."""

    facts: dict[str, Any]  # JSON-compatible
    run: Callable[[int], None]  # takes so many steps and waits for the last
    memory: Callable[[], int | None]  # peak bytes on one device, None if unknown


def configured(job: dict[str, Any]) -> ConfigDict:
    """Return the config of a job; raise UserError if it is invalid."""
    from cap_pretrain.validation import validate

    config = Trial(job["config"], job["config"], parse_overrides(job["overrides"])).resolved()
    validate(config)
    return config


def synthetic(config: ConfigDict, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return random images and tokens for the shapes in `batch`; texts have their full length.

    Images in their own aspect ratio have ratios between 1 : 2 and 2 : 1.
    """
    rng = np.random.default_rng(0)
    ends = {"image": 256, "text": config.text.vocab_size}
    made = {
        name: (
            rng.integers(name == "text", ends[name], x.shape, x.dtype)
            if name in ends and x.dtype.kind in "iu"
            else np.zeros(x.shape, x.dtype)
        )
        for name, x in batch.items()
    }
    if config.data.layout == naflex.NAFLEX:
        for image in made["image"]:
            height, width = (1000 * 2 ** rng.uniform(-0.5, 0.5, 2)).astype(int).tolist()
            rows, columns = naflex.grid(height, width, len(image))
            image[:, -naflex.GRID :] = rows, columns
            image[rows * columns :] = 0
    return made


def ours(job: dict[str, Any]) -> Candidate:
    """Compile our training step as `train` builds it, and put state and batch on the devices."""
    import jax

    from cap_pretrain import learners
    from cap_pretrain.distributed import sharding
    from cap_pretrain.models import build
    from cap_pretrain.optim import schedule
    from cap_pretrain.training import plan
    from cap_pretrain.training.setup import make_optimizer
    from cap_pretrain.training.step import init_state, make_train_step

    config = configured(job)
    set_environment(config)
    devices = jax.devices()
    if job["platform"] not in (None, devices[0].platform):
        raise UserError(
            f"--suite={job['platform']}: JAX found no such device here, only "
            f"{devices[0].device_kind}; with --config.batch_size=… this is measured all the same."
        )
    if job["batch_per_device"]:
        config.batch_size = job["batch_per_device"] * len(devices)
    build.check_device(config)
    vocab_size = config.text.vocab_size
    rate = schedule.learning_rate(config, schedule.make_schedule(config, epoch=config.batch_size))
    # As in `setup.prepare`, from functions that earlier versions of the package have, too.
    optimizer = functools.partial(make_optimizer, config, rate, idle=False)
    config = settled(config, optimizer, devices)
    mesh = sharding.make_mesh(config)
    init, state, graphdef, tx = init_state(
        lambda key: learners.build(config, vocab_size, key), optimizer, config, mesh
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_train_step(graphdef, tx, rate, config, shardings)
    shapes = plan.abstract_batch(config)
    shapes["broken"] = jax.ShapeDtypeStruct((config.batch_size,), np.bool_)
    with jax.set_mesh(mesh):
        batch = sharding.put_batch(synthetic(config, shapes), mesh)
        start = time.perf_counter()
        compiled = step.lower(state, batch).compile()
        seconds = time.perf_counter() - start
        held = [init()]
        jax.block_until_ready(held)

    def run(steps: int) -> None:
        with jax.set_mesh(mesh):
            for _ in range(steps):
                held[0], metrics = compiled(held[0], batch)
            jax.block_until_ready(metrics)

    sizes = compiled.memory_analysis()
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    needed += sizes.output_size_in_bytes - sizes.alias_size_in_bytes

    def memory() -> int:
        return (devices[0].memory_stats() or {}).get("peak_bytes_in_use", needed)

    facts = {
        **facts_of(config, vocab_size, devices),
        "parameters": plan.count_parameters(state.params)["total"],
        "mesh": dict(mesh.shape),
        "compile_seconds": seconds,
        "compiler_bytes": needed,
        "predicted_seconds": predicted(compiled.as_text(), devices),
    }
    return Candidate(facts, run, memory)


def facts_of(config: ConfigDict, vocab_size: int, devices: Sequence[Any]) -> dict[str, Any]:
    """Return what is known of our step before it is compiled."""
    import jax

    from cap_pretrain.models import build
    from cap_pretrain.telemetry import flops
    from cap_pretrain.training import plan

    peak = flops.system_peak(devices)
    training = plan.flops_per_example(config, vocab_size)["training"]
    return {
        "platform": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "batch_size": config.batch_size,
        "learner": config.learner.name,
        "model": config.model.name,
        "optimizer": config.optim.name,
        **{f"model.{k}": config.model[k] for k in ("attention", "remat", "unroll")},
        "dtype": str(build.compute(config).dtype),
        "flops_per_step": training * config.batch_size,
        "peak_flops": peak.flops,
        "peak_source": peak.source,
        "version": f"jax {jax.__version__}",
    }


def set_environment(config: ConfigDict) -> None:
    """Set what a run sets before it uses devices."""
    from cap_pretrain.distributed import determinism

    determinism.set_environment(config)
    with contextlib.suppress(ImportError):  # of earlier versions
        from cap_pretrain.distributed import gpu

        gpu.set_environment()


def settled(config: ConfigDict, optimizer: Callable[[Any], Any], devices: Sequence[Any]) -> Any:
    """Return the config with what a run settles by the memory of its devices."""
    try:
        from cap_pretrain.training import automatic
    except ImportError:  # of earlier versions
        return config
    limit = automatic.memory_of(devices[0])
    return automatic.settle(config, config.text.vocab_size, optimizer, devices, limit).config


def predicted(text: str, devices: Sequence[Any]) -> float | None:
    """Return the seconds that tools/check_topology.py predicts for a compiled program, if it can.

    It can for the kinds of TPUs and GPUs that it knows.
    """
    from cap_pretrain.telemetry import flops

    chip = flops.chip_of(devices[0])
    if not (chip and chip.peak and chip.hbm_bandwidth and chip.ici_bandwidth):
        return None
    try:
        from cap_pretrain.topology import hlo
        from cap_pretrain.topology.compilers import compiler_for

        return compiler_for(devices).measure(hlo.parse(text), chip, devices).seconds
    except Exception:  # the program may have operations that no prediction has met
        traceback.print_exc()
        return None


def torchs(job: dict[str, Any]) -> Candidate:
    """Build the same model in PyTorch; raise UserError if it has a part that is missing there."""
    try:
        import torch
    except ImportError as error:
        raise UserError("PyTorch is not installed: pip install -e '.[torch]'") from error
    from tools import torch_baseline

    config = configured(job)
    shape = torch_shape(config)
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not torch.cuda.is_available()
    device, compiled = ("cpu", False) if on_cpu else ("cuda", True)
    compiled = compiled if job["compiled"] is None else job["compiled"]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")  # allows TF32
    torch.manual_seed(0)
    config.batch_size = job["batch_per_device"] or config.batch_size
    sizes = (config.batch_size, config.data.image_size, config.data.image_size, 3)
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, sizes, np.uint8)).to(device)
    text = rng.integers(1, shape.vocab_size, (config.batch_size, shape.length))
    model = torch_baseline.build(shape).to(device)
    if compiled:
        torch_baseline.compile_parts(model)
    step = torch_baseline.make_step(
        model,
        images,
        torch.from_numpy(text).to(device),
        clip_norm=config.optim.clip_norm,
        weight_decay=config.optim.weight_decay,
    )

    def run(steps: int) -> None:
        for _ in range(steps):
            loss = step()
        loss.item()  # waits

    start = time.perf_counter()
    run(1)
    facts = {
        "platform": "cpu" if on_cpu else "gpu",
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer": "adamw",
        "dtype": "bfloat16 autocast" if device == "cuda" else "float32",
        "compile_seconds": time.perf_counter() - start if compiled else None,
        "version": f"torch {torch.__version__}",
    }
    return Candidate(facts, run, lambda: None if on_cpu else torch.cuda.max_memory_allocated())


def torch_shape(config: ConfigDict) -> Any:
    """Return the `torch_baseline.Shape` of a config; raise UserError if there is none."""
    from cap_pretrain.models import build
    from cap_pretrain.models.sizes import parse_name
    from tools.torch_baseline import Shape

    needed: dict[str, Any] = {
        "accumulate": 1,
        "model.class_token": False,
        "model.pre_norm": False,
        "model.final_norm": "tokens",
        "model.activation": "gelu_tanh",
        "model.dropout": 0,
        "model.stochastic_depth": 0,
        "model.keep_tokens": 1,
        "optim.ema": 0,
    }
    learner, objective = config.learner, "cap"
    if learner.name == "dual_encoder":
        objective = {"softmax": "clip", "sigmoid": "siglip"}[learner.contrast]
    elif learner.name == "captioner":
        needed |= {"learner.label_smoothing": 0, "learner.average": "example"}
    else:
        raise UserError(f"--compare torch: there is no {learner.name} in PyTorch here.")
    from cap_pretrain.config import get

    needed["data.layout"] = naflex.SQUARE
    for field, value in needed.items():
        if get(config, field) != value:
            raise UserError(f"--compare torch: {field} must be {value!r} there.")
    captions = objective == "cap"
    return Shape(
        objective,
        build.encoder_size(config),
        build.decoder_size(config) if captions else build.text_size(config),
        parse_name(config.model.name)[1],
        config.data.image_size,
        config.text.vocab_size,
        config.text.length,
        learner.parallel_fraction if captions else 0.0,
        config.model.pool,
    )


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error of JAX or torch is about memory."""
    text = f"{type(error).__name__} {error}"
    return any(word in text for word in ("RESOURCE_EXHAUSTED", "OutOfMemory", "out of memory"))


def main() -> None:
    """Serve one job until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints go to standard error

    def answer(**content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    try:
        job = json.loads(sys.stdin.readline())
        candidate = {"ours": ours, "torch": torchs}[job["kind"]](job)
        candidate.run(job["warmup"])
        answer(**candidate.facts)
        for line in sys.stdin:
            steps = json.loads(line)["steps"]
            start, cpu_start = time.perf_counter(), time.process_time()
            candidate.run(steps)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            answer(seconds=seconds / steps, cpu=cpu / steps, memory=candidate.memory())
    except UserError as error:
        answer(error="user", message=str(error))
    except Exception as error:
        traceback.print_exc()
        kind = "memory" if out_of_memory(error) else "failure"
        answer(error=kind, message=str(error).partition("\n")[0])


if __name__ == "__main__":
    main()
