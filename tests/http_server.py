"""A fast small HTTP server for tests: the transport, without what it answers."""

import contextlib
import dataclasses
import socketserver
import time
from typing import Any

REASONS = {200: "OK", 204: "No Content", 206: "Partial Content", 304: "Not Modified"}
REASONS |= {308: "Resume Incomplete", 400: "Bad Request", 403: "Forbidden", 404: "Not Found"}
REASONS |= {412: "Precondition Failed", 416: "Range Not Satisfiable", 503: "Unavailable"}


@dataclasses.dataclass
class Answer:
    """What is sent back."""

    status: int
    body: bytes
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


def date(moment: float) -> str:
    """Return a time as headers have it."""
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(moment))


class Threaded(socketserver.ThreadingTCPServer):
    daemon_threads, request_queue_size, allow_reuse_address = True, 128, True
    owner: Any  # has `answer`


class Connection(socketserver.StreamRequestHandler):
    """Reads the requests of one connection; http.server would take three times as long."""

    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            while line := self.rfile.readline():
                method, target, _ = line.decode("latin-1").split(" ")
                headers = {}
                while (line := self.rfile.readline().strip()) != b"":
                    name, _, value = line.decode("latin-1").partition(":")
                    headers[name.lower()] = value.strip()
                if headers.get("expect", "").lower() == "100-continue":
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                answer = self.server.owner.answer(method, target, headers, self._body(headers))
                about = {"Content-Length": str(len(answer.body)), "Date": date(time.time())}
                lines = [f"HTTP/1.1 {answer.status} {REASONS.get(answer.status, 'Other')}"]
                lines += [f"{k}: {v}" for k, v in (about | answer.headers).items()]
                self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1") + answer.body)

    def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(headers.get("content-length") or 0))
        data = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(data)
