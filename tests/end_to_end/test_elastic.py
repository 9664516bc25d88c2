"""Elastic and failing workers on real nodes: raylets that a test starts, kills and drains.

A node is one `ray start --block` with one CPU and a label, so two nodes are two places.
"""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

RAY = Path(sys.executable).parent / "ray"
LABEL = "moce.dist/expert-group"
SLOW = ("moce.epochs=40", "checkpoint.every_steps=1000")


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class Node:
    """A raylet of its own, as on a machine of its own."""

    def __init__(self, *flags):
        common = ["--node-ip-address=127.0.0.1", "--object-store-memory=80000000", "--block"]
        self.process = subprocess.Popen(
            [RAY, "start", *flags, *common, "--disable-usage-stats"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def family(self):
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def workers(self):
        return [p for p in self.family() if "RayTrainWorker" in " ".join(p.cmdline())]

    def kill(self):
        """End everything at once, as a machine that loses its power."""
        for process in [*self.family(), psutil.Process(self.process.pid)]:
            process.kill()
        self.process.wait()

    def drain(self):
        """What Kubernetes does first to a pod that it evicts."""
        self.process.send_signal(signal.SIGTERM)

    def close(self):
        if self.process.poll() is None:
            self.kill()
        self.process.stdout.close()


class Nodes:
    """A cluster: a head without CPUs, and nodes that come and go."""

    def __init__(self):
        self.address = f"127.0.0.1:{free_port()}"
        port = self.address.rpartition(":")[2]
        flags = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
        self.alive = [Node(*flags)]
        time.sleep(5)

    def add(self, group=None, cpus=1):
        labels = [f"--labels={LABEL}={group}"] if group else []
        node = Node(f"--address={self.address}", f"--num-cpus={cpus}", *labels)
        self.alive.append(node)
        return node

    def close(self):
        for node in reversed(self.alive):
            node.close()


@pytest.fixture
def nodes():
    cluster = Nodes()
    yield cluster
    cluster.close()
