"""Making units with Apache Beam, on any number of machines (the optional extra `beam`).

All machines must see the input files and the work folder of the build under the same paths. The
sequential pass over the finished units runs on the machine where the build was started.
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
    """Make the units that are missing; a replacement for `units.make_all`.

    Each process calls `make_builder` once, which must be picklable. `builder` and `workers` are not
    used: the number of workers is among the runner's `options`, such as ["--runner=FlinkRunner",
    …]. Raises UserError if Beam is not installed.
    """
    del builder, workers
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            "--beam: Apache Beam is not installed; pip install 'cap_pretrain[beam]'."
        ) from error
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
