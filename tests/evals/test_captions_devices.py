"""Captions and their perplexity are the same on one device and on meshes of eight."""

import jax
import numpy as np
import pytest
from flax import nnx

from cap_pretrain.distributed import sharding
from cap_pretrain.evals.captions import Captions
from cap_pretrain.evals.perplexity import Perplexity
from cap_pretrain.models.decoding import Decoding, write_captions
from cap_pretrain.topology import hlo
from tests import tiny
from tests.evals import stubs
from tests.layouts import on_eight_devices

METHODS = {
    "beam": {"method": "beam", "beams": 3},
    "greedy": {"method": "greedy"},
    "sample": {"method": "sample", "temperature": 1.5},
    "groups_with_rules": {
        **{"method": "beam", "beams": 4, "groups": 2, "captions": 2},
        **{"min_length": 2, "repetition_penalty": 1.3, "no_repeat_ngram": 2},
    },
}


def measured(tokenizer_path, shape, methods, count=7):
    """Return the captions by each method and the perplexity, on a mesh of this shape."""
    fields = {f"mesh__{axis}": n for axis, n in zip(("data", "fsdp", "tensor"), shape, strict=True)}
    fields |= {"data__scenes__length_val": count, "text__length": 10}
    context, (params, stats) = stubs.small("captioner", tokenizer_path, **fields)
    # Scaled so that captions depend on the image and do not repeat one word.
    for part in ("query", "value"):
        params["decoder"]["blocks"]["cross_attention"][part]["kernel"] *= 4
    params["decoder"]["logits"]["bias"] *= 0
    params["text_positions"] *= 5
    params = jax.device_put(params, sharding.param_shardings(params, context.mesh))
    variables = params, jax.device_put(stats, sharding.replicated(context.mesh))
    with jax.set_mesh(context.mesh), jax.transfer_guard("disallow"):
        results = [
            Captions(context, Captions.Options(count=count, **METHODS[method]))(variables)
            for method in methods
        ]
        options = Perplexity.Options(batch_size=3, pairs=8)
        perplexity = Perplexity(context, options)(variables)
    for result in (*results, perplexity):
        assert not result.metrics.keys() & result.details.keys()  # of one JSON object
    captions = [[sample["caption"] for sample in r.details["samples"]] for r in results]
    return captions, perplexity.metrics, perplexity.details


@pytest.mark.slow
def test_one_device_and_eight_write_the_same(tokenizer_path):
    path, methods = str(tokenizer_path), [*METHODS]
    captions, metrics, details = measured(path, (1, 1, 1), methods)
    ((captions_8, metrics_8, details_8),) = on_eight_devices(measured, [[path, (2, 2, 2), methods]])
    assert captions == captions_8
    assert len({caption for by_method in captions for caption in by_method}) > 2
    assert details == details_8
    assert metrics.keys() == metrics_8.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_8[name], value, rtol=1e-6, err_msg=name)


def communication(method, prompted, fsdp=1):
    """Return the collective operations of decoding on all devices: in its loop, and before it."""
    c = tiny.config()
    c.mesh.fsdp = fsdp
    mesh = sharding.make_mesh(c)
    graphdef, params, stats = tiny.split(c)

    def write(variables, images, keys, prompt):
        learner, how = nnx.merge(graphdef, *variables), Decoding(**METHODS[method], top_k=5)
        common = dict(length=tiny.LENGTH, eos=1, keys=keys, prompt=prompt if prompted else None)
        return write_captions(learner, images, how, **common)

    keys = jax.random.split(jax.random.key(0), 16)
    batch = tiny.images(16), keys, tiny.texts([3] * 16)
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    shardings = sharding.param_shardings(params, mesh), sharding.replicated(mesh)
    variables = jax.device_put((params, stats), shardings)
    with jax.set_mesh(mesh):
        program = hlo.parse(jax.jit(write).lower(variables, *batch).compile().as_text())
    found = {
        name: [(op.collective, op.size) for op in operations if op.collective]
        for name, operations in program.computations.items()
    }
    loops = [op for op in program.computations[program.entry] if op.opcode == "while"]
    decoding = loops[-1].runs("condition", "body")
    inside = [what for name in decoding for what in found.pop(name)]
    return inside, [what for of_one in found.values() for what in of_one]


ONLY_WHETHER_DONE = [["all-reduce", 1]]  # of one byte


@pytest.mark.slow
def test_the_devices_only_tell_each_other_whether_they_are_done():
    calls = [[method, prompted] for method in METHODS for prompted in (False, True)]
    for inside, outside in on_eight_devices(communication, calls):
        assert inside == ONLY_WHETHER_DONE and not outside


@pytest.mark.slow
def test_weights_are_gathered_before_the_first_token_and_not_for_each():
    for inside, outside in on_eight_devices(communication, [[m, False, 4] for m in [*METHODS][:3]]):
        assert inside == ONLY_WHETHER_DONE
        assert {kind for kind, _ in outside} >= {"all-gather"}
