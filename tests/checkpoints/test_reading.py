"""A failure to read a checkpoint that passes is not taken for a corrupt one."""

import errno
from pathlib import Path

import pytest

from cap_pretrain import files
from cap_pretrain.checkpoints.manifest import CorruptCheckpointError
from cap_pretrain.checkpoints.reading import out_of_reach, read_on_all_hosts

PLACE = files.place("gs://bucket/runs/a/checkpoints/4")


def wrapped(cause):
    error = ValueError("no metadata")
    error.__cause__ = cause
    return error


OUTAGES = {
    "gcsfs": wrapped(OSError(errno.EIO, "Service Unavailable", f"{PLACE}/learner/_METADATA")),
    "a time limit": wrapped(TimeoutError()),
    "tensorstore": ValueError("ABORTED: Error reading: All 32 retry attempts failed"),
    "credentials": ValueError("UNAUTHENTICATED: the token has expired"),
}


def failing(error):
    def read():
        raise error

    return read


@pytest.mark.parametrize("case", OUTAGES)
def test_a_bucket_out_of_reach_does_not_make_a_checkpoint_corrupt(case):
    with pytest.raises(OSError, match=str(PLACE)) as raised:
        read_on_all_hosts(PLACE, failing(OUTAGES[case]))
    assert (raised.value.errno, raised.value.filename) == (errno.EIO, str(PLACE))


@pytest.mark.parametrize(
    "error",
    [
        wrapped(FileNotFoundError(errno.ENOENT, "No such file")),
        wrapped(OSError("Not a gzipped file")),
        ValueError("DATA_LOSS: checksum"),
        CorruptCheckpointError(f"{PLACE}: is corrupt (its manifest is missing)"),
    ],
)
def test_what_is_damaged_is_corrupt(error):
    with pytest.raises(CorruptCheckpointError) as raised:
        read_on_all_hosts(PLACE, failing(error))
    assert str(raised.value).count("is corrupt (") == 1


def test_a_lack_of_memory_or_a_failing_disk_is_no_outage():
    with pytest.raises(MemoryError):
        read_on_all_hosts(PLACE, failing(MemoryError()))
    error = OSError(errno.EIO, "Input/output error", "/run/checkpoints/4/x")
    with pytest.raises(OSError, match="Input/output") as raised:
        read_on_all_hosts(Path("/run/checkpoints/4"), failing(error))
    assert raised.value is error


def test_a_save_that_an_outage_stops_names_the_bucket():
    error = ValueError("UNAVAILABLE: Error writing: HTTP response code: 503")
    found = out_of_reach(error, PLACE)
    assert found and (found.errno, found.filename) == (errno.EIO, str(PLACE))
    assert out_of_reach(error, Path("/run/checkpoints")) is None
