"""Ranges of a remote file, read only while the file is the one that was listed."""

import datetime as dt
from collections.abc import Mapping
from typing import Any

from cap_pretrain.data.sources.storage import STAMPS, Remote
from cap_pretrain.errors import UserError

_CHANGED = 412  # HTTP's "Precondition Failed" (RFC 9110, section 15.5.13)


def stamps(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return what a listing's entry says about the content of a file: size, ETag, times, …."""
    found = {name: entry.get(name) for name in ("size", *STAMPS, "generation")}
    return {  # times are datetimes in some answers of a file system and numbers in others
        name: str(value.timestamp() if isinstance(value, dt.datetime) else value)
        for name, value in found.items()
        if value is not None
    }


def read_range(remote: Remote, start: int, stop: int, entry: Mapping[str, Any]) -> bytes:
    """Return exactly the bytes from `start` up to `stop` of the file that `entry` lists.

    The request names the version of the file where the file system can (S3, Google Cloud Storage,
    HTTP); otherwise the file is looked up again after the read. Transient errors are retried.

    Raises:
        UserError: the file has changed since it was listed, or cannot be read.
    """

    def read(fs: Any, path: str) -> bytes:
        try:
            data, pinned = _read(fs, path, start, stop, entry)
        except Exception as error:
            if _status(error) == _CHANGED:
                raise _changed(remote) from error
            if isinstance(error, FileNotFoundError):
                raise _changed(remote, "was removed or replaced") from error
            raise
        if not pinned:
            fs.invalidate_cache(fs._parent(path))
            if _differ(stamps(entry), stamps(fs.info(path))):
                raise _changed(remote)
        if len(data) != stop - start:
            raise OSError(f"{len(data)} bytes came instead of {stop - start}")
        return data

    return remote.call(read)


def _read(
    fs: Any, path: str, start: int, stop: int, entry: Mapping[str, Any]
) -> tuple[bytes, bool]:
    """Return bytes of a file, and whether the server compared its version with the listed one."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    etag = entry.get("ETag") or entry.get("etag")
    if "s3" in protocols and etag:
        from fsspec.asyn import sync

        async def get() -> bytes:
            bucket, key, _ = fs.split_path(path)
            answer = await fs._call_s3(
                "get_object",
                Bucket=bucket,
                Key=key,
                IfMatch=etag,
                Range=f"bytes={start}-{stop - 1}",
                **fs.req_kw,
            )
            async with answer["Body"] as body:
                return await body.read()

        return sync(fs.loop, get), True
    if "gs" in protocols and entry.get("generation"):
        return fs.cat_file(path, start=start, end=stop, generation=entry["generation"]), True
    # Weak ETags never match If-Match (RFC 9110, section 13.1.1).
    if protocols & {"http", "https"} and etag and not etag.startswith("W/"):
        return fs.cat_file(path, start=start, end=stop, headers={"If-Match": etag}), True
    return fs.cat_file(path, start=start, end=stop), False


def _differ(some: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Return whether the stamps of two answers are of different contents."""
    both = some.keys() & others
    # A listing may round the times that are more precise in the answer about a file.
    exact = both & {"etag", "ETag", "md5Hash", "generation"}
    return any(some[name] != others[name] for name in (exact | {"size"} if exact else both))


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status that caused an error of botocore, aiohttp or gcsfs."""
    while error is not None:
        answer = getattr(error, "response", None)
        if isinstance(answer, dict):
            return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for name in ("status", "code"):
            if isinstance(getattr(error, name, None), int):
                return getattr(error, name)
        error = error.__cause__
    return None


def _changed(remote: Remote, what: str = "changed") -> UserError:
    return UserError(
        f"{remote}: {what} while it was in use; start again to read the dataset as it is now."
    )
