"""After its first step a run compiles nothing, and nothing moves between host and device unseen.

JAX counts its compilations itself (`jax.monitoring`), and its transfer guard refuses what nobody
asked for. The guard lets the host read the arrays of a CPU, since they lie in its own memory, so
the tests play its part in that direction: what they refuse would end a run on a GPU or TPU.
"""

import contextlib
import threading
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from cap_pretrain import evals, train
from cap_pretrain.checkpoints.checkpoint import Checkpoints
from cap_pretrain.training import setup
from cap_pretrain.training.watch import Watch
from tests import quick, toy
from tests.layouts import LAYOUTS, SMALL, on_eight_devices

STEPS, SAVE, EVALUATE = 12, 4, 5
COMPILATION = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/backend_compile_duration",
)
# How the host reads an array without saying so.
READS = ("__array__", "__bool__", "__float__", "__index__", "__int__", "item", "tolist")


def run(workdir, tokenizer, layout="one", learner="captioner"):
    """A run that logs each step, and saves and evaluates now and then."""
    c = toy.config(
        learner,
        {"parallel_fraction": 0.75} if learner == "captioner" else {},
        total_steps=STEPS,
        checkpoint__every_steps=SAVE,
        eval__every_steps=EVALUATE,
        text__tokenizer=tokenizer,
        log__ids=True,
        **SMALL,
        **dict(zip(("mesh__data", "mesh__fsdp", "mesh__tensor"), LAYOUTS[layout], strict=True)),
    )
    c.evals = ConfigDict({"val": evals.defaults("loss", limit=8)})
    train.run(c, Path(workdir))


@contextlib.contextmanager
def guarded_as_on_a_gpu():
    """Extends the transfer guard to arrays of a CPU that the host reads other than by device_get.

    That `copy_to_host_async` counts, and device_get does not, is from JAX's `py_array.cc`.
    """
    array, asked = type(jax.numpy.zeros(())), threading.local()

    def guarded(read):
        def read_if_allowed(self, *args, **kwargs):
            level = jax.config.jax_transfer_guard_device_to_host
            if level == "disallow" and not getattr(asked, "for_it", False):
                raise RuntimeError(f"Disallowed device-to-host transfer: {self.aval}")
            return read(self, *args, **kwargs)

        return read_if_allowed

    def device_get(x, get=jax.device_get):
        asked.for_it = True
        try:
            return get(x)
        finally:
            asked.for_it = False

    with contextlib.ExitStack() as stack:
        for name in (*READS, "copy_to_host_async"):
            patch = mock.patch.object(array, name, guarded(getattr(array, name)))
            stack.enter_context(patch)
        stack.enter_context(mock.patch.object(jax, "device_get", device_get))
        yield


def compiled(workdir, tokenizer, layout):
    """What JAX traces or compiles in a guarded run, as pairs (step, function); 0 is before all."""
    step, found = 0, set()
    make = setup.make_train_step

    def counting(*args):
        take = make(*args)

        def counted(state, batch, requests=None):
            nonlocal step
            step += 1
            return take(state, batch, requests)

        return counted

    def listen(event, duration, fun_name="", **_):
        if event in COMPILATION:
            found.add((step, fun_name.removeprefix("jit(").removesuffix(")")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with mock.patch.object(setup, "make_train_step", counting), guarded_as_on_a_gpu():
            run(workdir, tokenizer, layout)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert step == STEPS
    return sorted(found)


def assert_steady(found):
    """Nothing but the step in step 1, and the evaluators the first time they run."""
    assert [name for step, name in found if step == 1] == ["train_step"]
    assert {step for step, _ in found} <= {0, 1, EVALUATE}


@pytest.mark.slow
def test_after_the_first_step_nothing_is_compiled(tokenizer_path, tmp_path):
    assert_steady(compiled(tmp_path, str(tokenizer_path), "one"))


@pytest.mark.slow
def test_nor_is_it_on_eight_devices(tokenizer_path, tmp_path):
    ((*found,),) = on_eight_devices(compiled, [(str(tmp_path), str(tokenizer_path), "all")])
    assert_steady(found)


class Enough(BaseException):
    pass


def test_what_nobody_asked_for_is_refused_in_the_loop(tokenizer_path, tmp_path):
    """The guard is on around the step and the saving, in the real loop."""
    refused = []

    def move(x):
        for unasked in (lambda: x + np.float32(1), lambda: float(x), x.copy_to_host_async):
            with pytest.raises((jax.errors.JaxRuntimeError, RuntimeError)) as error:
                unasked()
            refused.append(str(error.value))

    def add(self, step, metrics):
        move(metrics["loss"])
        return metrics

    def save(self, state, flush):
        move(state.step)
        raise Enough

    add, save = mock.patch.object(Watch, "add", add), mock.patch.object(Checkpoints, "save", save)
    with add, save, guarded_as_on_a_gpu(), pytest.raises(Enough):
        run(tmp_path, str(tokenizer_path), learner=quick.NAME)
    assert len(refused) == 3 * (SAVE + 1)
    for number, message in enumerate(refused):
        way = "device-to-host" if number % 3 else "host-to-device"
        assert f"Disallowed {way} transfer" in message
