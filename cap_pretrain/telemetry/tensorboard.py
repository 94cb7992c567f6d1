"""TensorBoard event files, written synchronously.

tensorboardX builds the events, but its own writer uses a thread, and if that dies, for example
because the disk is full, training waits for it forever.
"""

import os
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from cap_pretrain import files

# tensorboardX imports torch if it is installed, for a writer that is not used here, which would
# delay every start by two seconds. None makes Python raise the ImportError that it expects.
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
try:
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import masked_crc32c
finally:
    if sys.modules["torch"] is None:
        del sys.modules["torch"]


class EventFile:
    """A new event file in `folder`, which is created if missing.

    TensorBoard hides events of `first_step` and later in earlier files. Every method raises
    OSError, with the name of the file, if it cannot write.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = files.Appended(folder / name)
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add a point to the curve of each name."""
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._add(step=step, summary=Summary(value=points))

    def text(self, step: int, tag: str, text: str) -> None:
        """Add a Markdown text."""
        self._add(step=step, summary=summary.text(tag, text))

    def images(self, step: int, tag: str, images: np.ndarray) -> None:
        """Add images, uint8 [N, H, W, 3], as one grid."""
        self._add(step=step, summary=summary.image(tag, images, dataformats="NHWC"))

    def flush(self) -> None:
        """Return when others can read what was added."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, **fields: Any) -> None:
        """Append one event in the framing of a TFRecord."""
        data = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        self._file.write(length + checksums[0] + data + checksums[1])
