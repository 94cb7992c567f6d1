"""With a sharded vocabulary, neither the logits nor the kernel before them is gathered."""

import numpy as np
import pytest

from tests.collectives import Sent, of_step
from tests.layouts import SMALL, VOCAB, Training, config, on_eight_devices


def check(layout, size, fields):
    """Check the compiled step of a captioner; each device holds `size` words of the vocabulary."""
    ((sent, computed),) = on_eight_devices(of_step, [("cap", layout, {"accumulate": 1} | fields)])
    step = Sent(sent, computed)
    assert not [shape for shape in step.shapes("all-gather", "all-to-all") if VOCAB in shape]
    length = 16 // fields.get("model__logit_chunks", 1)
    batch = 16 if layout == "tensor" else 4
    assert [batch, length, size] in step.computed  # logits
    assert [32, size] in step.computed  # the kernel that makes them
    assert not [shape for shape in step.computed if VOCAB in shape]


@pytest.mark.slow
def test_logits_of_a_shared_vocabulary_stay_where_they_are():
    check("tensor", VOCAB // 8, {"model__logit_chunks": 2})


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "size"), [("tensor", VOCAB // 8), ("all", VOCAB // 2)])
def test_logits_of_whole_texts_stay_where_they_are(layout, size):
    check(layout, size, {})


@pytest.mark.slow
def test_the_kernel_is_gathered_once_for_all_chunks():
    fields = {"accumulate": 1, "model__remat": "none", "model__logit_chunks": 4}
    step = Sent(*on_eight_devices(of_step, [("cap", "fsdp", fields)])[0])
    kernels = [shape for shape in step.shapes("all-gather") if sorted(shape) == [32, VOCAB]]
    assert len(kernels) == 1


def losses_on(layout, chunks):
    fields = SMALL | {"accumulate": 1, "model__heads": 8, "model__logit_chunks": chunks}
    training = Training(config("cap", **fields), layout)
    return training.go_on(training.init(), 3)[1]


@pytest.mark.slow
def test_chunked_or_whole_on_any_layout_the_loss_is_the_same():
    calls = [("one", 1), ("fsdp", 3), ("all", 4)]
    one, *others = on_eight_devices(losses_on, calls)
    assert len(set(one)) == 3
    for losses in others:
        np.testing.assert_allclose(losses, one, rtol=1e-5)
