"""Real images and real tars, made on the spot."""

import io
import os
import re
import subprocess
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image


def _some_image(seed: int, kind: str = "PNG", side: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def _tar(path, members):
    """Write members [(name, content)] with Python's own tarfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def some_image():
    return _some_image


@pytest.fixture
def tar_of():
    return _tar


@pytest.fixture
def image_folder(tmp_path):
    """Three classes with four images each, in two formats, one of them nested."""
    root = tmp_path / "images"
    for number in range(12):
        name = ("cat", "dog", "owl")[number % 3]
        kind = "JPEG" if number % 2 else "PNG"
        inner = root / name / ("deep" if number == 5 else "")
        inner.mkdir(parents=True, exist_ok=True)
        suffix = {"JPEG": "JPG", "PNG": "png"}[kind]
        (inner / f"{number:02d}.{suffix}").write_bytes(_some_image(number, kind))
    return root


@pytest.fixture
def three_tars(tmp_path):
    """Three tars of five samples: `t0/0` ... `t2/4`, each with png and cls."""
    return [
        _tar(
            tmp_path / "tars" / f"part-{shard}.tar",
            [
                member
                for row in range(5)
                for member in (
                    (f"t{shard}/{row}.png", _some_image(10 * shard + row)),
                    (f"t{shard}/{row}.cls", str(row).encode()),
                )
            ],
        )
        for shard in range(3)
    ]


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("NOT TESTED: a full disk needs root and a tmpfs mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class _FileHandler(BaseHTTPRequestHandler):
    """Serves files as a whole or by range; what a request meets is up to the server's `trouble`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(self.server.files[self.path], 200, self.server.trouble(0))

    def do_GET(self):
        content = self.server.files[self.path]
        with self.server.lock:
            self.server.asked.append(self.path)
            kind = self.server.trouble(len(self.server.asked))
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if found is None or kind == "whole":
            return self._answer(content, 200, kind)
        start, last = map(int, found.groups())
        return self._answer(content[start : last + 1], 206, kind)

    def _answer(self, body, status, kind=""):
        status = {"busy": 503, "forbidden": 403, "missing": 404}.get(kind, status)
        body = body if status < 400 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)
        self.close_connection = kind == "cut"


@pytest.fixture
def file_server():
    """Start a server of {path: content}; `trouble` says what its n-th GET meets, or a HEAD (0).

    That is "", busy, forbidden, missing, cut (half of the content), whole (no range of it).
    """
    servers = []

    def start(files, trouble=lambda number: ""):
        server = ThreadingHTTPServer(("127.0.0.1", 0), _FileHandler)
        server.files, server.trouble, server.asked = files, trouble, []
        server.lock, server.daemon_threads = threading.Lock(), True
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
