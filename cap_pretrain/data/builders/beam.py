"""Units made by Apache Beam, on as many machines as a runner has (an optional extra, `beam`).

All machines see the same files under the same paths: those that are read, and the folder of the
build. What is one pass, over the finished units, is done where the build was started.
"""

import functools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

from cap_pretrain.data.builders import units
from cap_pretrain.errors import UserError


def make_all(
    builder: units.RowMaker,
    make_builder: Callable[[], units.RowMaker],
    all_units: Sequence[units.Unit],
    folder: Path,
    workers: int,
    *,
    options: Sequence[str],
) -> None:
    """As `units.make_all`.

    Args:
        builder: not used; each process has one of its own.
        make_builder: called in each process to have one there.
        all_units: all units of the build, of which the missing ones are made.
        folder: where they are.
        workers: not used; the runner knows.
        options: of the pipeline, as ["--runner=FlinkRunner", …].

    Raises:
        UserError: Beam is not installed.
    """
    del builder, workers
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError("--beam: Beam is missing; pip install 'cap_pretrain[beam]'.") from error
    left = [unit for unit in all_units if not unit.path(folder).exists()]
    if not left:
        return
    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        made = pipeline | beam.Create(left) | beam.Reshuffle()
        _ = made | beam.Map(_make, pickle.dumps(make_builder), folder.absolute())


def _make(unit: units.Unit, make_builder: bytes, folder: Path) -> None:
    units.make(_builder(make_builder), unit, folder, threads=1)


@functools.lru_cache(maxsize=1)
def _builder(make_builder: bytes) -> units.RowMaker:
    return pickle.loads(make_builder)()
