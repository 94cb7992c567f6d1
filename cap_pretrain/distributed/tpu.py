"""The TPUs of this machine, without starting them."""

import importlib.util
from pathlib import Path

import jax


def chips() -> int:
    """Return the number of device files of TPU chips; those in /dev/vfio may be other devices."""
    return len([*Path("/dev").glob("accel[0-9]*")] or [*Path("/dev/vfio").glob("[0-9]*")])


def will_be_used() -> bool:
    """Return whether JAX is going to use TPUs, without starting any device."""
    platforms = jax.config.values["jax_platforms"] or "tpu"
    installed = importlib.util.find_spec("libtpu") is not None
    return "tpu" in platforms.split(",") and installed and chips() > 0
