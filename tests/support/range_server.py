"""A server of byte ranges that misbehaves as it is told to."""

import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class _RangeHandler(BaseHTTPRequestHandler):
    """Serves ranges of byte strings, badly where it is told to."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        content, behaviour = self.server.files[path]
        self.server.requests[path] += 1
        kind, _, when = behaviour.partition("-")
        if self.server.requests[path] > {"once": 1, "twice": 2, "": 10**9}[when]:
            kind = ""
        if kind == "stall":
            self.server.closing.wait(30)
            self.close_connection = True
            return
        status = {"busy": 503, "forbidden": 403, "missing": 404}.get(kind, 206)
        start, stop = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups()
        body = content[int(start) : int(stop) + 1] if status == 206 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
        self.close_connection = kind == "cut"


class _RangeServer(ThreadingHTTPServer):
    daemon_threads = True

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def range_server():
    """Start a server of {path: (content, behaviour)}: "", busy, forbidden, missing, stall, cut.

    A behaviour may end in -once or -twice: it is over after so many requests.
    """
    servers = []

    def start(files):
        server = _RangeServer(("127.0.0.1", 0), _RangeHandler)
        server.files, server.requests, server.closing = files, Counter(), threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.closing.set()
        server.shutdown()
        server.server_close()
