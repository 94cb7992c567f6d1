"""The platform that functions are traced for, which decides how the models compute."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_DEVICE: contextvars.ContextVar[jax.Device | None] = contextvars.ContextVar("device", default=None)


def platform_of(device: jax.Device) -> str:
    """Return "cpu", "gpu" or "tpu" for a device, perhaps one that exists only for a compiler."""
    return {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)


def platform() -> str:
    """Return the platform of the default devices, or of the device in `tracing_for`."""
    device = _DEVICE.get()
    return platform_of(device) if device else jax.default_backend()


def device_kind() -> str:
    """Return the kind of the default devices, or of the device in `tracing_for`: "TPU v4", say."""
    return (_DEVICE.get() or jax.devices()[0]).device_kind


@contextlib.contextmanager
def tracing_for(device: jax.Device) -> Iterator[None]:
    """Trace for a device that this machine lacks: one of a topology, for its compiler."""
    token = _DEVICE.set(device)
    try:
        yield
    finally:
        _DEVICE.reset(token)
