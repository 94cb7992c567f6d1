"""A trace of some training steps, for `log.profile_steps`: what host and devices do, and when."""

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import jax

from cap_pretrain import files
from cap_pretrain.errors import UserError

T = TypeVar("T")

FOLDER = "profile"
"""The folder in a workdir with the traces of its runs."""

MOST = 100  # steps: a trace is kept in memory until it ends, and viewers load all of it


def parse(text: str) -> range:
    """Return the steps that `log.profile_steps` names, none for ""; raise UserError if invalid."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text, re.ASCII)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 0 < first <= last < first + MOST:
        raise UserError(
            f"log.profile_steps: {text!r} is not FIRST:LAST, two steps from 1 on with at most "
            f"{MOST} from the first to the last, as 100:105."
        )
    return range(first, last + 1)


def notes(text: str, total: int) -> list[str]:
    """Return a line if a run of `total` steps ends before the steps that are to be traced."""
    steps = parse(text)
    if not (steps and total < steps[0]):
        return []
    return [f"log.profile_steps: {text} is not traced, because the run ends at step {total:,}."]


@dataclasses.dataclass(frozen=True)
class Profiler:
    """Traces steps of a run into WORKDIR/profile, in the first process of a cluster.

    Attributes:
        steps: The value of `log.profile_steps`.
        workdir: Folder of the run.
        say: Receives a line when a trace is stored, or the reason that none is.
        pause: Returns a context whose time does not count as that of a step.
    """

    steps: str
    workdir: Path
    say: Callable[[str], None]
    pause: Callable[[], AbstractContextManager[None]]

    def traced(
        self, batches: Iterator[tuple[int, T]], state: Callable[[], Any]
    ) -> Iterator[tuple[int, T]]:
        """Yield what `batches` does, and trace the steps meanwhile.

        A step lasts until the next is asked for. In the trace it is called "train", with its number
        as `step_num`. Of steps that a resumed run has already taken, none is traced.

        Args:
            batches: Pairs (step, batch), in order.
            state: Returns the newest arrays that the devices compute.
        """
        steps = parse(self.steps) if jax.process_index() == 0 else range(0)
        if not steps:
            yield from batches
            return
        trace, first, step = None, 0, 0
        try:
            for step, batch in batches:
                if step in steps and not first:
                    trace, first = self._begin(state), step
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    yield step, batch
                if trace and step == steps[-1]:
                    done, trace = trace, None
                    self._end(done, state, f"{first}:{step}")
        finally:
            if trace:
                self._end(trace, state, f"{first}:{step}")

    def _begin(self, state: Callable[[], Any]) -> tempfile.TemporaryDirectory | None:
        """Begin a trace in the folder that is returned; return None if that fails."""
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python functions would slow down the host
        with self.pause(), self._losses_said():
            jax.block_until_ready(state())
            folder = tempfile.TemporaryDirectory(prefix="profile-")
            jax.profiler.start_trace(folder.name, profiler_options=options)
            return folder
        return None

    def _end(
        self, folder: tempfile.TemporaryDirectory, state: Callable[[], Any], traced: str
    ) -> None:
        """Store the trace of the steps `traced` in the workdir, which may be in a bucket.

        Viewers look for traces in LOGDIR/plugins/profile/NAME.
        """
        name = f"steps_{self.steps.replace(':', '_')}"
        target = self.workdir / FOLDER / "plugins" / "profile" / name
        with self.pause(), folder, self._losses_said():
            try:
                jax.block_until_ready(state())
            finally:
                jax.profiler.stop_trace()
            for file in Path(folder.name).rglob("*.*"):
                if file.is_file():
                    files.write_bytes(target / file.name, file.read_bytes())
            self.say(f"A trace of the steps {traced} is in {target}.")

    @contextlib.contextmanager
    def _losses_said(self) -> Iterator[None]:
        """Say which error prevented a trace; the run does not end for it."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            self.say(f"log.profile_steps: the steps {self.steps} are not traced ({error}).")
