"""What the compilers predict of inference: writing captions, scoring texts, features of images."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from cap_pretrain import learners
from cap_pretrain.distributed import sharding
from cap_pretrain.distributed.platform import tracing_for
from cap_pretrain.errors import UserError
from cap_pretrain.evals.base import data_parallel
from cap_pretrain.evals.inference.portions import PORTION, in_portions
from cap_pretrain.learners.protocols import Encodes, ScoresTexts, WritesCaptions
from cap_pretrain.models.build import image_shape
from cap_pretrain.models.decoding import Decoding, write_captions
from cap_pretrain.telemetry import flops
from cap_pretrain.topology import hlo
from cap_pretrain.topology.compilers import compiler_for

WHAT = ("greedy", "beam", "compare", "features")
TEXTS = 16  # that `compare` scores for each image


def check(
    config: ConfigDict, vocab_size: int, what: str, devices: Sequence[jax.Device]
) -> dict[str, Any]:
    """Compile one batch of inference for `devices`; report bytes and seconds on one of them.

    `config` is from `compile.prepare` and `what` one of WHAT. `token` is one iteration of the loop
    over tokens and `rest` all else; a program without such a loop is all `rest`. Captions take
    `text.length` tokens. Raises UserError if the learner cannot do it.
    """
    config = copy.deepcopy(config)
    config.model.remat = "none"  # nothing is differentiated
    mesh = sharding.make_mesh(config, devices)
    images = config.batch_size // data_parallel(mesh)
    if what == "features" and images % PORTION:
        raise UserError(
            f"batch_size: {images} images on a device are no multiple of {PORTION}, which the "
            "encoder takes at a time."
        )
    compiler, chip = compiler_for(devices), flops.chip_of(devices[0])
    assert chip
    arrays = _arrays(config, what)
    graphdef, variables = nnx.split(
        nnx.eval_shape(lambda: learners.build(config, vocab_size, jax.random.key(0)))
    )
    member, run = _program(config, what, mesh)
    whole, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)

    def placed(tree, where):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
        )

    program: Any = jax.jit(
        lambda v, x: run(member.of(nnx.merge(graphdef, v)), *x), out_shardings=whole
    )
    with jax.set_mesh(mesh), tracing_for(devices[0]):
        lowered = program.lower(placed(variables, whole), placed(arrays, split))
        try:
            compiled = lowered.compile()
        except Exception as e:
            if out_of_memory := compiler.out_of_memory(e):
                raise UserError(f"--what: {out_of_memory}; lower batch_size.") from None
            raise
    module = hlo.parse(compiled.as_text())
    total = compiler.measure(module, chip, devices)
    parts = {"bytes": total.hbm_bytes, "seconds": total.seconds}
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    report: dict[str, Any] = {"images": images, "rest": parts, "tokens": 0, "needed": needed}
    report["limit"] = compiler.memory_limit(devices[0])
    report["fits"] = needed <= report["limit"]
    if what in ("greedy", "beam"):
        loop = [op for op in module.computations[module.entry] if op.opcode == "while"][-1]
        (body,) = loop.runs("body")
        counted = module.trips(loop, module.entry) or 1
        one = compiler.measure(dataclasses.replace(module, entry=body), chip, devices)
        token = {"bytes": one.hbm_bytes, "seconds": one.seconds, "kernels": sum(one.count.values())}
        rest = {name: parts[name] - counted * token[name] for name in parts}
        report |= {"token": token, "rest": rest, "tokens": config.text.length}
    return report


def text(report: dict[str, Any]) -> str:
    """Return a report as text."""
    images, rest, tokens = report["images"], report["rest"], report["tokens"]
    lines = [f"{images} images on a device, predicted, not measured:"]
    seconds = rest["seconds"]
    if tokens:
        token = report["token"]
        seconds += tokens * token["seconds"]
        lines.append(
            f"each token of all of them: {token['bytes'] / 1e6:.1f} MB, "
            f"{token['seconds'] * 1e6:.0f} us, {token['kernels']:.0f} kernels"
        )
    lines.append(
        f"{'the rest, ' if tokens else ''}each image: {rest['bytes'] / images / 1e6:.1f} MB, "
        f"{rest['seconds'] / images * 1e6:.0f} us"
    )
    lines.append(
        f"in all {images / seconds:,.0f} images/s on a device; it needs "
        f"{report['needed'] / 2**30:.2f} of {report['limit'] / 2**30:.2f} GiB"
    )
    return "\n".join(lines)


def _arrays(config: ConfigDict, what: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return what a batch has: images and, for `compare`, texts of each."""
    images = image_shape(config, config.batch_size)
    texts = jax.ShapeDtypeStruct((config.batch_size, TEXTS, config.text.length), np.int32)
    return (images, texts) if what == "compare" else (images,)


def _program(config: ConfigDict, what: str, mesh: Any) -> tuple[learners.Member, Any]:
    """Return what computes it, and the function of that and the arrays of a batch."""
    needs = {"compare": ScoresTexts, "features": Encodes}.get(what, WritesCaptions)
    member = learners.able(config, needs)
    if member is None:
        raise UserError(f"--what: {what}, which a learner {config.learner.name!r} cannot do.")
    if what == "features":
        return member, lambda learner, images: in_portions(
            lambda part: learner.encode(part).pooled.astype(jnp.float32), images, mesh
        )
    if what == "compare":
        return member, lambda learner, images, texts: learner.compare(
            learner.image_features(images), texts
        )
    how = Decoding(method=what)
    return member, lambda learner, images: write_captions(
        learner, images, how, length=config.text.length, eos=1
    )
