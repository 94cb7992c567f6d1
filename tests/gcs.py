"""A server of Google Cloud Storage's JSON API on 127.0.0.1, with objects in memory.

It does what gcsfs, TensorStore and Google's own client ask of it: uploads in one part, in several
and resumable ones, reading of ranges, listing in pages, deleting, copying, moving, composing,
generations and conditions on them. `fail` and `on` plant faults, `log` has every request.
"""

import base64
import collections
import dataclasses
import fnmatch
import json
import re
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable
from typing import Any

from tests import http_server as http
from tests.http_server import Answer


@dataclasses.dataclass
class Stored:
    """An object of a bucket."""

    data: bytes
    generation: int
    updated: float
    kind: str = "application/octet-stream"


@dataclasses.dataclass(frozen=True)
class Request:
    """A request that was answered: what it was for, and the bytes of content both ways."""

    kind: str  # read, stat, write, delete, list, copy, …
    name: str  # BUCKET/OBJECT; for a list BUCKET/PREFIX
    status: int
    received: int
    sent: int


class FailureError(Exception):
    """An answer that is not a success."""

    def __init__(self, status: int, message: str = ""):
        super().__init__(message or http.REASONS.get(status, ""))
        self.status = status


class Server:
    """The server, which runs while it is entered.

    Attributes:
        url: Where it is.
        objects: By BUCKET/OBJECT.
        log: All requests, in order.
    """

    def __init__(self, *buckets: str, page: int = 1000):
        self.buckets, self.page = set(buckets), page
        self.objects: dict[str, Stored] = {}
        self.log: list[Request] = []
        self._faults: list[list[Any]] = []  # kind, pattern, status, times left
        self._calls: list[tuple[str, str, Callable[[], None]]] = []
        self._uploads: dict[str, dict[str, Any]] = {}
        self._lock = threading.RLock()
        self._generation = int(time.time() * 1e6)

    def __enter__(self) -> "Server":
        self._server = http.Threaded(("127.0.0.1", 0), http.Connection)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        serve = lambda: self._server.serve_forever(poll_interval=0.05)
        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point gcsfs and TensorStore here, without credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",
        }

    def fail(self, kind: str, pattern: str, status: int = 503, times: int = 10**9) -> None:
        """Answer the next requests of a kind, for objects of a pattern, with a failure."""
        self._faults.append([kind, pattern, status, times])

    def heal(self) -> None:
        """Plant no faults any more."""
        self._faults.clear()
        self._calls.clear()

    def on(self, kind: str, pattern: str, call: Callable[[], None]) -> None:
        """Call before each request of a kind for objects of a pattern."""
        self._calls.append((kind, pattern, call))

    def requests(self, kind: str = "*", pattern: str = "*") -> list[Request]:
        """Return the requests of a kind for objects of a pattern so far."""
        match = fnmatch.fnmatchcase
        return [r for r in [*self.log] if match(r.kind, kind) and match(r.name, pattern)]

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the objects, without `prefix`."""
        return sorted(n.removeprefix(prefix) for n in [*self.objects] if n.startswith(prefix))

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        """Answer a request."""
        path, _, query = target.partition("?")
        asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        kind, name, act = "other", path, None
        try:
            kind, name, act = self._route(method, path, asked, headers, body)
            for wanted, pattern, call in [*self._calls]:
                if fnmatch.fnmatchcase(kind, wanted) and fnmatch.fnmatchcase(name, pattern):
                    call()
            with self._lock:
                for fault in self._faults:
                    if (
                        fault[3] > 0
                        and fnmatch.fnmatchcase(kind, fault[0])
                        and fnmatch.fnmatchcase(name, fault[1])
                    ):
                        fault[3] -= 1
                        raise FailureError(fault[2], "planted")
                answer = act()
        except FailureError as failure:
            content = {"error": {"code": failure.status, "message": str(failure)}}
            answer = Answer(failure.status, json.dumps(content).encode())
        self.log.append(Request(kind, name, answer.status, len(body), len(answer.body)))
        return answer

    def _route(self, method: str, path: str, asked: dict, headers: dict, body: bytes) -> Any:
        """Return the kind of a request, the name of what it is for, and what answers it."""
        unquote = urllib.parse.unquote
        if found := re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path):
            bucket, upload = unquote(found[1]), asked.get("uploadType")
            if "upload_id" in asked:
                return self._resumed(method, asked["upload_id"], headers, body)
            about, data = _parts(upload, headers, body)
            name = f"{bucket}/{asked.get('name') or about.get('name')}"
            if upload == "resumable":
                return "begin", name, lambda: self._begun(bucket, name, asked)
            kind = about.get("contentType") or headers.get("content-type", "")
            return "write", name, lambda: _json(self._put(bucket, name, data, asked, kind))
        if found := re.fullmatch(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)(/.*)?", path):
            bucket, name = unquote(found[1]), f"{unquote(found[1])}/{unquote(found[2])}"
            if found[3]:
                return self._made(bucket, name, found[3], asked, body)
            if method == "DELETE":
                return "delete", name, lambda: self._deleted(bucket, name, asked)
            if asked.get("alt") == "media":
                return "read", name, lambda: self._read(bucket, name, asked, headers)
            return "stat", name, lambda: _json(_about(name, self._found(bucket, name, asked)))
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            bucket = unquote(found[1])
            return "list", f"{bucket}/{asked.get('prefix', '')}", lambda: self._list(bucket, asked)
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            bucket = unquote(found[1])
            return "bucket", bucket, lambda: self._bucket(bucket)
        if method == "POST" and path == "/storage/v1/b":
            name = json.loads(body)["name"]
            return "make", name, lambda: self.buckets.add(name) or self._bucket(name)
        return "other", path, lambda: _raise(FailureError(404))

    def _bucket(self, bucket: str) -> Answer:
        if bucket not in self.buckets:
            raise FailureError(404, "The specified bucket does not exist.")
        return _json({"kind": "storage#bucket", "name": bucket})

    def _found(self, bucket: str, name: str, asked: dict) -> Stored:
        self._bucket(bucket)
        stored = self.objects.get(name)
        if stored is None or asked.get("generation", str(stored.generation)) != str(
            stored.generation
        ):
            raise FailureError(404, f"No such object: {name}")
        _check(stored, asked)
        return stored

    def _put(self, bucket: str, name: str, data: bytes, asked: dict, kind: str = "") -> dict:
        self._bucket(bucket)
        _check(self.objects.get(name), asked)
        self._generation += 1
        stored = Stored(bytes(data), self._generation, time.time(), kind)
        self.objects[name] = stored
        return _about(name, stored)

    def _deleted(self, bucket: str, name: str, asked: dict) -> Answer:
        self._found(bucket, name, asked)
        del self.objects[name]
        return Answer(204, b"")

    def _read(self, bucket: str, name: str, asked: dict, headers: dict) -> Answer:
        stored = self._found(bucket, name, asked)
        about = {
            "x-goog-generation": str(stored.generation),
            "x-goog-metageneration": "1",
            "x-goog-stored-content-length": str(len(stored.data)),
            "Last-Modified": http.date(stored.updated),
            "Content-Type": stored.kind or "application/octet-stream",
        }
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", ""))
        size = len(stored.data)
        if not found or found[0] == "bytes=-":
            return Answer(200, stored.data, about)
        if found[1]:
            start, stop = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
        else:
            start, stop = max(0, size - int(found[2])), size
        if start >= size:
            raise FailureError(416, "InvalidRange: not satisfiable")
        about["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Answer(206, stored.data[start:stop], about)

    def _list(self, bucket: str, asked: dict) -> Answer:
        self._bucket(bucket)
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
        first, end = asked.get("startOffset", ""), asked.get("endOffset", "")
        after = base64.urlsafe_b64decode(asked.get("pageToken", "")).decode()
        pattern = asked.get("matchGlob")
        pattern = re.escape(pattern).replace(r"\*", "[^/]*") if pattern else "(?s:.*)"
        count = min(self.page, int(asked.get("maxResults") or self.page))
        items, prefixes, token = [], {}, None
        for full in sorted(n for n in self.objects if n.startswith(f"{bucket}/{prefix}")):
            name = full.removeprefix(f"{bucket}/")
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            entry = prefix + head + delimiter if found else name
            if (
                not re.fullmatch(pattern, name)
                or name < first
                or (end and name >= end)
                or entry <= after
                or entry in prefixes
            ):
                continue
            if len(items) + len(prefixes) == count:
                last = max([*prefixes, *(item["name"] for item in items)])
                token = base64.urlsafe_b64encode(last.encode()).decode()
                break
            if found:
                prefixes[entry] = None
            else:
                items.append(_about(full, self.objects[full]))
        content = {"kind": "storage#objects", "items": items, "prefixes": [*prefixes]}
        return _json(content | ({"nextPageToken": token} if token else {}))

    def _made(self, bucket: str, name: str, rest: str, asked: dict, body: bytes) -> Any:
        """Return what answers a request that makes an object of others."""
        conditions = {k: v for k, v in asked.items() if not k.startswith(("source", "ifSource"))}
        own = {"generation": asked["sourceGeneration"]} if "sourceGeneration" in asked else {}
        if rest == "/compose":
            sources = [f"{bucket}/{s['name']}" for s in json.loads(body)["sourceObjects"]]

            def compose() -> Answer:
                data = b"".join(self._found(bucket, s, {}).data for s in sources)
                return _json(self._put(bucket, name, data, conditions))

            return "compose", name, compose
        found = re.fullmatch(r"/(rewriteTo|copyTo|moveTo)(?:/b/([^/]+))?/o/([^/]+)", rest)
        if not found:
            raise FailureError(404)
        other = urllib.parse.unquote(found[2] or bucket)
        target = f"{other}/{urllib.parse.unquote(found[3])}"

        def copy() -> Answer:
            stored = self._found(bucket, name, own)
            about = self._put(other, target, stored.data, conditions, stored.kind)
            if found[1] == "moveTo":
                del self.objects[name]
            if found[1] != "rewriteTo":
                return _json(about)
            return _json({"kind": "storage#rewriteResponse", "done": True, "resource": about})

        return "move" if found[1] == "moveTo" else "copy", target, copy

    def _begun(self, bucket: str, name: str, asked: dict) -> Answer:
        self._bucket(bucket)
        number = f"upload-{len(self._uploads)}"
        self._uploads[number] = {
            "bucket": bucket,
            "name": name,
            "asked": asked,
            "data": bytearray(),
        }
        query = f"uploadType=resumable&upload_id={number}"
        where = f"{self.url}/upload/storage/v1/b/{urllib.parse.quote(bucket)}/o?{query}"
        return Answer(200, b"", {"Location": where})

    def _resumed(self, method: str, number: str, headers: dict, body: bytes) -> Any:
        """Return what answers a part of a resumable upload."""
        upload = self._uploads.get(number)
        if upload is None:
            return "write", number, lambda: _raise(FailureError(404))
        found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", headers.get("content-range", ""))
        data: bytearray = upload["data"]

        def act() -> Answer:
            if method == "DELETE":
                self._uploads.pop(number)
                raise FailureError(499)
            if found and found[1]:
                if int(found[1]) != len(data):
                    raise FailureError(503)
                data.extend(body)
            elif not found:
                data.extend(body)
            if found and (found[3] == "*" or int(found[3]) > len(data)):
                return Answer(308, b"", {"Range": f"bytes=0-{len(data) - 1}"} if data else {})
            self._uploads.pop(number)
            bucket, name, asked = (upload[k] for k in ("bucket", "name", "asked"))
            return _json(self._put(bucket, name, data, asked))

        return "write", upload["name"], act


def _json(content: Any) -> Answer:
    return Answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def _raise(error: Exception) -> Answer:
    raise error


def _about(name: str, stored: Stored) -> dict[str, Any]:
    bucket, _, key = name.partition("/")
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(stored.updated))
    moment += f".{int(stored.updated % 1 * 1000):03d}Z"
    return {
        **{"kind": "storage#object", "name": key, "bucket": bucket, "metageneration": "1"},
        **{"generation": str(stored.generation), "size": str(len(stored.data))},
        **{"updated": moment, "timeCreated": moment, "contentType": stored.kind},
        **{"etag": f"{zlib.crc32(str(stored.generation).encode()):x}"},
    }


def _check(stored: Stored | None, asked: dict) -> None:
    """Raise Failure if the conditions of a request do not hold."""
    now = str(stored.generation if stored else 0)
    if asked.get("ifGenerationMatch", now) != now:
        raise FailureError(412, "conditionNotMet")
    if asked.get("ifGenerationNotMatch") == now:
        raise FailureError(304)


def _parts(upload: str | None, headers: dict, body: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the description of an upload and its content."""
    if upload == "resumable":
        return json.loads(body or b"{}"), b""
    if upload != "multipart":
        return {}, body
    boundary = re.search(r'boundary="?([^";]+)"?', headers["content-type"])[1].encode()
    _, about, content, _ = re.split(rb"(?:^|\r?\n)--" + re.escape(boundary), body)
    described = re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1]
    kind, data = re.split(rb"\r?\n\r?\n", content, maxsplit=1)
    found = re.search(rb"(?i)content-type: *([^\r\n]+)", kind)
    return {"contentType": found[1].decode() if found else "", **json.loads(described)}, data


def counted(requests: list[Request]) -> collections.Counter[str]:
    """Return how many requests of each kind there are."""
    return collections.Counter(request.kind for request in requests)
