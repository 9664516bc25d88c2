"""Serve S3 from a separate process for benchmarks and tests: moto, with delayed answers.

python -m benches.s3_server PORT_FILE LATENCY_S
"""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benches.harness import child_environment

_START_TIMEOUT_S = 60.0
COUNTS_PATH = "/__counts__"
_Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class Delayed:
    """A WSGI application that delays its answers, and counts those to GET and their bytes."""

    def __init__(self, application: _Wsgi, latency_s: float) -> None:
        self._application, self._latency_s = application, latency_s
        self._lock = threading.Lock()
        self._requests, self._bytes = 0, 0

    def __call__(
        self, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """Answer one request."""
        if environ["PATH_INFO"] == COUNTS_PATH:
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [f"{self._requests} {self._bytes}".encode()]
        time.sleep(self._latency_s)
        body = b"".join(self._application(environ, start_response))
        if environ["REQUEST_METHOD"] == "GET":
            with self._lock:
                self._requests += 1
                self._bytes += len(body)
        return [body]


@contextmanager
def s3_server(latency_s: float) -> Iterator[str]:
    """Run the server; yield its URL on the loopback interface.

    Raises:
        ModuleNotFoundError: moto is not installed.
        RuntimeError: the server did not start.
    """
    import moto.server  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        port = Path(folder) / "port"
        command = [sys.executable, "-m", __name__, str(port), str(latency_s)]
        process = subprocess.Popen(command, stdout=sys.stderr, env=child_environment())
        try:
            yield f"http://127.0.0.1:{_wait_for(port, process)}"
        finally:
            process.kill()
            process.wait()


def _wait_for(port: Path, process: "subprocess.Popen[bytes]") -> str:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        if port.exists() and (text := port.read_text()):
            return text
        time.sleep(0.05)
    raise RuntimeError("the S3 server did not start")


def main() -> None:
    """Write the port to PORT_FILE, and serve until killed."""
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    port_file, latency_s = sys.argv[1:]
    application = Delayed(DomainDispatcherApplication(create_backend_app), float(latency_s))
    server = make_server("127.0.0.1", 0, application, threaded=True)
    Path(port_file).write_text(str(server.server_port))
    server.serve_forever()


if __name__ == "__main__":
    main()
