"""What the compilers of this package have in common: one interface for TPUs and for GPUs.

Nothing here imports JAX, because the compilers read their environment when JAX starts.
"""

import abc
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    from ml_collections import ConfigDict

    from cap_pretrain.telemetry.flops import Chip
    from cap_pretrain.topology.cost import Cost
    from cap_pretrain.topology.hlo import Module


class OutOfMemoryError(Exception):
    """The step needs `needed` bytes of one device's memory, if known, of the usable `limit`."""

    def __init__(self, needed: int, limit: int):
        super().__init__(f"needs {needed:,} bytes of HBM, but only {limit:,} are available")
        self.needed, self.limit = needed, limit


class Compiler(abc.ABC):
    """A compiler for devices that this machine lacks.

    Attributes:
        device: What one device is called, in reports and messages.
        kinds: What precedes the colon in the names of topologies.
        network: What one device sends to other hosts, in Gb/s, where no other links join them.
    """

    device: str
    kinds: Sequence[str]
    # One adapter of 400 Gb/s per GPU, as in an NVIDIA DGX H100 (data sheet)
    network = 400.0

    @abc.abstractmethod
    def environment(self) -> dict[str, str]:
        """Return the environment variables that the compiler needs, if not set otherwise."""

    def set_environment(self) -> None:
        """Set `environment`, before JAX starts a backend; set variables are kept."""
        for name, value in self.environment().items():
            os.environ.setdefault(name, value)

    @abc.abstractmethod
    def open(self, name: str, slices: int = 1) -> Sequence["jax.Device"]:
        """Return devices that exist only for the compiler; may raise UserError.

        `slices` is the number of TPU slices, or 1 for other devices.
        """

    @abc.abstractmethod
    def memory_limit(self, device: "jax.Device") -> int:
        """Return the bytes of memory that a program may use on one device."""

    def out_of_memory(self, error: Exception) -> OutOfMemoryError | None:  # noqa: ARG002
        """Parse the compiler's message about memory; None if it is another, or it has none."""
        return None

    @abc.abstractmethod
    def choices(
        self, config: "ConfigDict", vocab_size: int, devices: Sequence["jax.Device"]
    ) -> dict[str, Any]:
        """Return what the fields of a config that are "auto" or 0 become in a run on `devices`.

        The fields are dtype, model.attention, model.remat and model.unroll.
        """

    @abc.abstractmethod
    def measure(self, module: "Module", chip: "Chip", devices: Sequence["jax.Device"]) -> "Cost":
        """Return the predicted cost of running a program once on one of the devices.

        `chip` is their performance.
        """

    @abc.abstractmethod
    def operations(self, cost: "Cost") -> dict[str, Any]:
        """Return what a report says about the work of operations.

        The key "operations" has their seconds by what they are.
        """

    @abc.abstractmethod
    def kind(self, kernel: str, name: str) -> str:
        """Return the kind of an operation: "products", "attention", "layout" or "other".

        `kernel` is as in `cost.Kernel`, and `name` the path of the operation in the traced program.
        """

    @abc.abstractmethod
    def of_size(self, topology: str, devices: int) -> tuple[str, int]:
        """Return a topology of that many devices in all, like another one, and its slices.

        Raises UserError if there is none.
        """

    def notes(
        self,
        config: "ConfigDict",  # noqa: ARG002
        vocab_size: int,  # noqa: ARG002
        cost: "Cost",  # noqa: ARG002
        devices: Sequence["jax.Device"],  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return what else a report says about a program; "remarks" are blocks of its text."""
        return {}
