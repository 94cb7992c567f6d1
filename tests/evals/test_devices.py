"""Evaluators that score texts give the same metrics on one device and on eight, in any batches.

Retrieval uses all of `Scoring`: texts shared by all images, texts of each image, with and without
prior. The others sum the same scores on the host; they are compared only in the slow test.
"""

import json

import jax
import pytest

from cap_pretrain.evals.composition import Composition
from cap_pretrain.evals.retrieval import Retrieval
from cap_pretrain.evals.zero_shot import ZeroShot
from tests.evals import stubs
from tests.layouts import begun_on_eight_devices

OTHERS = (
    (ZeroShot, {}),
    (Composition, {"questions": "scenes"}),
    (Composition, {"questions": "order"}),
)


def metrics(tokenizer_path, batch_size, pairs):
    """Return the metrics of both kinds of learners on all devices."""
    found = []
    for kind in ("captioner", "dual_encoder"):
        mesh = {"mesh__data": -1, "mesh__fsdp": min(2, len(jax.devices()))}
        context, variables = stubs.small(kind, tokenizer_path, **mesh)
        # As in training, which disallows implicit transfers.
        with jax.set_mesh(context.mesh), jax.transfer_guard_host_to_device("disallow"):
            for cls, more in ((Retrieval, {}), *OTHERS):
                options = cls.Options(batch_size=batch_size, pairs=pairs, **more)
                result = cls(context, options)(variables)
                assert {"protocol", "dataset", "split", "images"} <= result.details.keys()
                assert not result.metrics.keys() & result.details.keys()  # of one JSON object
                found.append(json.loads(json.dumps(result.metrics | result.details)))
    return found


@pytest.mark.slow
def test_one_device_and_eight_give_the_same_metrics(tokenizer_path):
    eight = begun_on_eight_devices(metrics, [(str(tokenizer_path), 5, 64)])
    one = metrics(str(tokenizer_path), 3, 8)
    assert eight() == [one]
    values = {x for result in one for x in result.values() if isinstance(x, float)}
    assert len(values) > 20
