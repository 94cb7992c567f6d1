"""Serve the report of runs that go on, on this machine only."""

import http.server
import re
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

HOST = "127.0.0.1"
"""The only address that is listened on: nobody else on the network can connect."""

THIS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?", re.IGNORECASE)
"""This machine in a request's field Host. The port differs where another one is forwarded here."""

PERIOD = 5
"""Seconds between two looks for news by a page."""


def server(render: Callable[[], str], port: int) -> http.server.ThreadingHTTPServer:
    """Return a server of the page that `render` returns, made anew for each request.

    It answers GET / from a browser that asks for this host, and nothing else: a page elsewhere
    that has its name resolved to this machine gets no answer. Port 0 takes any free one. Raises
    OSError if the port is taken.
    """
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not THIS.fullmatch(self.headers.get("Host", "")):
                return self.send_error(403)
            if urlsplit(self.path).path != "/":
                return self.send_error(404)
            try:
                with lock:  # one at a time: a page takes memory and a core
                    page = render().encode()
            except Exception as error:  # the run may just be writing; the next request may succeed
                return self.send_error(500, explain=str(error))
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(page)
            return None

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its own name
            """Print nothing for each request."""

    return http.server.ThreadingHTTPServer((HOST, port), Handler)
